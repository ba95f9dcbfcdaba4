"""Batched products with a shared operand: the same numbers, by one product instead of many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dattri_core import Task, batched
from dattri_core.batched import LARGE, NARROW, SharedOperands, shared_operands
from dattri_core.evaluate import Evaluator
from dattri_core.products import batch_product


class Counted(TorchDispatchMode):
    """Counts batched and plain matrix products below other modes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))

    def count(self, operation):
        return sum(func is operation for func in self.seen)


SIZES = st.tuples(*[st.integers(1, 6)] * 4)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.booleans(), st.booleans(), st.integers(0, 99))
def test_equals_the_batched_product(sizes, shared_left, transposed, seed):
    torch.manual_seed(seed)
    c, n, d, o = sizes
    if shared_left:
        left = torch.randn(n, d).double().expand(c, n, d)
        right = torch.randn(c, o, d).double().mT if transposed else torch.randn(c, d, o).double()
    else:
        left = torch.randn(c, d, n).double().mT if transposed else torch.randn(c, n, d).double()
        right = torch.randn(d, o).double().expand(c, d, o)
    want = torch.stack([a @ b for a, b in zip(left, right, strict=True)])
    with SharedOperands():
        got = torch.bmm(left, right)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("outputs", "shared", "batched"), [(3, True, 0), (NARROW + 1, True, 1), (3, False, 1)]
)
def test_only_narrow_shared_products_are_replaced(outputs, shared, batched):
    left = torch.randn(1, 4, 5).expand(6, 4, 5) if shared else torch.randn(6, 4, 5)
    counted = Counted()
    with counted, SharedOperands():
        torch.bmm(left, torch.randn(6, 5, outputs))
    assert counted.count(torch.ops.aten.bmm.default) == batched
    assert counted.count(torch.ops.aten.mm.default) == 1 - batched


def test_the_tangents_of_a_linear_layer_take_the_wide_product():
    inputs = torch.randn(5, 7)
    tangents = torch.randn(4, 3, 7)
    counted = Counted()
    with counted, SharedOperands():
        got = torch.vmap(lambda v: torch.nn.functional.linear(inputs, v))(tangents)
    torch.testing.assert_close(got, torch.einsum("nd,cod->cno", inputs, tangents))
    assert counted.count(torch.ops.aten.bmm.default) == 0


@pytest.mark.parametrize(
    ("shapes", "used"),
    [(((10, 784), (10,)), True), (((128, 784), (10, 128)), False), (((10, 784, 3),), False)],
)
def test_it_is_used_where_narrow_layers_prevail(shapes, used):
    vectors = {str(at): torch.zeros(2, *shape) for at, shape in enumerate(shapes)}
    assert isinstance(shared_operands(vectors, 2, LARGE), SharedOperands) is used


@pytest.mark.parametrize(("vectors", "examples", "used"), [(10, 1000, True), (1, 1000, False)])
def test_it_is_used_for_large_steps(monkeypatch, vectors, examples, used):
    monkeypatch.setattr(batched, "LARGE", 10 * 1000 * 50)
    given = {"weight": torch.zeros(20, 10, 5)}
    assert isinstance(shared_operands(given, vectors, examples), SharedOperands) is used


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_products_of_large_steps_are_those_of_small_ones(monkeypatch, kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3).double()
    data = torch.randn(8, 6).double(), torch.randint(0, 3, (8,))
    evaluator = Evaluator(Task(model), Task(model).checkpoints[0], data)
    vectors = {name: torch.randn(5, *p.shape).double() for name, p in model.named_parameters()}
    small = batch_product(evaluator, data, vectors, kind)
    monkeypatch.setattr(batched, "LARGE", 0)
    counted = Counted()
    with counted:
        large = batch_product(evaluator, data, vectors, kind)
    assert counted.count(torch.ops.aten.bmm.default) == 0
    for name, value in small.items():
        torch.testing.assert_close(large[name], value, rtol=1e-12, atol=1e-14)
