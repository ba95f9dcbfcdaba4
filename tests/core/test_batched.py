"""Batched products with a shared operand: the same numbers, by one product instead of many."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dattri_core.batched import NARROW, SharedOperands, shared_operands


class Counted(TorchDispatchMode):
    """Counts batched and plain matrix products below other modes."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        if func is torch.ops.aten.bmm.default or func is torch.ops.aten.mm.default:
            self.shapes.append([tuple(arg.shape) for arg in args])
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


def with_empty_columns(n, d):
    """Return a matrix with empty columns at both ends, in the middle, and one alone."""
    matrix = torch.randn(n, d).double()
    for gap in (
        slice(0, 3),
        slice(d // 2, d // 2 + 5),
        slice(d // 2 + 7, d // 2 + 8),
        slice(-4, d),
    ):
        matrix[:, gap] = 0
    return matrix


@pytest.mark.parametrize("outputs", [3, NARROW + 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_columns_that_are_zero_for_all_are_left_out(outputs, transposed):
    shared = with_empty_columns(6, 47)
    right = torch.randn(5, outputs, 47).double().mT if transposed else torch.randn(5, 47, outputs)
    right = right.double()
    left = torch.randn(5, outputs, 6).double()
    counted = Counted()
    with counted, SharedOperands():
        forward = torch.bmm(shared.expand(5, 6, 47), right)
        back = torch.bmm(left, shared.expand(5, 6, 47))
    torch.testing.assert_close(forward, shared @ right, rtol=0, atol=1e-13)
    torch.testing.assert_close(back, left @ shared, rtol=0, atol=1e-13)
    assert 47 not in {size for shapes in counted.shapes for shape in shapes for size in shape}


def test_all_columns_may_be_zero():
    with SharedOperands():
        got = torch.bmm(torch.randn(3, 2, 4), torch.zeros(4, 5).expand(3, 4, 5))
    assert torch.equal(got, torch.zeros(3, 2, 5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_zero_times_what_is_not_finite_is_not_left_out(bad):
    shared = with_empty_columns(6, 40)
    right = torch.randn(5, 40, 3).double()
    right[2, 1, 0] = bad
    with SharedOperands():
        got = torch.bmm(shared.expand(5, 6, 40), right)
    assert got[2, :, 0].isnan().all()
    assert got[:2].isfinite().all()


@pytest.mark.parametrize(
    ("shapes", "used"),
    [(((10, 784), (10,)), True), (((128, 784), (10, 128)), False), (((10, 784, 3),), False)],
)
def test_it_is_used_where_narrow_layers_prevail(shapes, used):
    vectors = {str(at): torch.zeros(2, *shape) for at, shape in enumerate(shapes)}
    batch = (torch.randn(3, 784), torch.zeros(3).long())
    assert isinstance(shared_operands(vectors, batch), SharedOperands) is used


@pytest.mark.parametrize(
    "batch", [with_empty_columns(3, 40), (with_empty_columns(3, 40).reshape(3, 4, 10),)]
)
def test_it_is_used_where_an_input_is_zero_for_all_examples(batch):
    assert isinstance(shared_operands({"w": torch.zeros(2, 128, 40)}, batch), SharedOperands)
