"""Rows to parameters and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.rows import rows_of

from dattri_core.blocks import DenseBlock, OuterBlock
from dattri_core.errors import SpecError
from dattri_core.lift import empty_rows, from_parameters, to_parameters
from dattri_core.rows import Rows
from dattri_core.space import BlockSpec, ParameterView, Space


def linear(name, out, inn, bias):
    views = [ParameterView(f"{name}.weight", (out, inn), 0, inn)]
    if bias:
        views.append(ParameterView(f"{name}.bias", (out,), inn, inn + 1))
    return BlockSpec(name, "outer", (out, inn + bias), tuple(views))


def conv(name, out, inn, bias):
    views = [ParameterView(f"{name}.weight", (out, inn, 2, 3), 0, 6 * inn)]
    if bias:
        views.append(ParameterView(f"{name}.bias", (out,), 6 * inn, 6 * inn + 1))
    return BlockSpec(name, "outer", (out, 6 * inn + bias), tuple(views))


def embedding(name, out, inn, bias):
    view = ParameterView(f"{name}.weight", (inn, out), 0, inn, transposed=True)
    return BlockSpec(name, "outer", (out, inn), (view,))


def norm(name, out, inn, bias):
    views = [ParameterView(f"{name}.weight", (out,), 0, 1)]
    if bias:
        views.append(ParameterView(f"{name}.bias", (out,), 1, 2))
    return BlockSpec(name, "dense", (out, 1 + bias), tuple(reversed(views)))


def whole(name, out, inn, bias):
    view = ParameterView(f"{name}.free", (out, inn, 2), 0, 2 * inn)
    return BlockSpec(name, "dense", (out, inn, 2), (view,))


def scalar(name, out, inn, bias):
    return BlockSpec(name, "dense", (), (ParameterView(f"{name}.scale", (), 0, 1),))


kinds = st.sampled_from([linear, conv, embedding, norm, whole, scalar])
layers = st.tuples(kinds, st.integers(1, 3), st.integers(1, 3), st.booleans())


@st.composite
def spaces(draw):
    chosen = draw(st.lists(layers, min_size=1, max_size=4))
    return Space(tuple(make(f"l{i}", o, n, int(b)) for i, (make, o, n, b) in enumerate(chosen)))


@settings(max_examples=40, deadline=None)
@given(spaces(), st.integers(0, 3))
def test_parameters_and_rows_are_inverse_of_each_other(space, count):
    flat = torch.arange(count * space.dim, dtype=torch.float64).reshape(count, space.dim)
    index = torch.arange(count) + 5
    values = to_parameters(Rows.from_flat(space, flat, index))
    shapes = {v.parameter: v.shape for block in space for v in block.parameters}
    assert {n: tuple(v.shape) for n, v in values.items()} == {
        n: (count, *shape) for n, shape in shapes.items()
    }
    for back in (rows_of(space, values, index), from_parameters(space, values, index)):
        assert torch.equal(back.flat(), flat)
        assert torch.equal(back.index, index)
    # Every entry of the rows reaches exactly one entry of one parameter.
    entries = torch.cat([v.reshape(count, v.shape[1:].numel()) for v in values.values()], 1)
    assert torch.equal(entries.sort(1).values, flat)


def test_gradients_of_a_linear_layer_arrive_in_the_shapes_of_its_parameters():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2).double()
    x, e = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    space = Space((linear("l", 2, 3, 1),))
    ones = torch.ones(4, 1, 1).double()
    block = OuterBlock(e.unsqueeze(1), torch.cat([x.unsqueeze(1), ones], 2))
    values = to_parameters(Rows(space, {"l": block}, torch.arange(4)))
    for b in range(4):
        layer.zero_grad()
        (layer(x[b]) * e[b]).sum().backward()
        torch.testing.assert_close(values["l.weight"][b], layer.weight.grad, rtol=0, atol=1e-14)
        torch.testing.assert_close(values["l.bias"][b], layer.bias.grad, rtol=0, atol=1e-14)


def test_gradients_of_an_embedding_arrive_untransposed():
    table = torch.nn.Embedding(3, 2).double()
    space = Space((embedding("e", 2, 3, 0),))
    out = torch.tensor([[1.0, 2.0]]).double()
    (table(torch.tensor([2])) * out).sum().backward()
    onehot = torch.tensor([[[0.0, 0.0, 1.0]]]).double()
    rows = Rows(space, {"e": OuterBlock(out.unsqueeze(0), onehot)}, torch.arange(1))
    assert torch.equal(to_parameters(rows)["e.weight"][0], table.weight.grad)


def test_rows_that_are_no_parameters_are_refused():
    space = Space((BlockSpec("features", "dense", (3,)),))
    rows = Rows(space, {"features": DenseBlock(torch.zeros(2, 3))}, torch.arange(2))
    with pytest.raises(SpecError, match=r"\['features'\] are not made of parameters.*per-example"):
        to_parameters(rows)
    with pytest.raises(SpecError, match="not made of parameters"):
        empty_rows(space, {}, torch.arange(2))


def test_parameters_without_values_are_named():
    space = Space((linear("l", 2, 3, 1),))
    with pytest.raises(SpecError, match=r"no values of \['l.bias'\]"):
        from_parameters(space, {"l.weight": torch.zeros(1, 2, 3)}, torch.arange(1))


def test_a_parameter_in_two_blocks_is_refused():
    view = ParameterView("w", (2, 3), 0, 3)
    space = Space(tuple(BlockSpec(n, "outer", (2, 3), (view,)) for n in "ab"))
    with pytest.raises(SpecError, match="'w' lies in the blocks 'a' and 'b'"):
        empty_rows(space, {"w": torch.zeros(1, 2, 3)}, torch.arange(1))


def test_views_with_a_gap_or_a_wrong_size_are_refused():
    for views in (
        (ParameterView("w", (2, 2), 0, 2), ParameterView("b", (2,), 1, 2)),
        (ParameterView("w", (2, 2), 0, 3),),
    ):
        space = Space((BlockSpec("l", "outer", (2, 3), views),))
        with pytest.raises(SpecError, match="cannot fill columns"):
            to_parameters(Rows(space, {"l": DenseBlock(torch.zeros(1, 2, 3))}, torch.arange(1)))


def test_rows_are_filled_through_their_parameters():
    weight = ParameterView("weight", (3, 2, 2), 0, 4)
    bias = ParameterView("bias", (3,), 4, 5)
    table = ParameterView("table", (6, 2), 0, 6, transposed=True)
    scale = ParameterView("scale", (), 0, 1)
    space = Space(
        (
            BlockSpec("conv", "outer", (3, 5), (weight, bias)),
            BlockSpec("table", "outer", (2, 6), (table,)),
            BlockSpec("scale", "dense", (), (scale,)),
        )
    )
    like = {"weight": torch.zeros(1, dtype=torch.float64)}
    rows = empty_rows(space, like, torch.arange(4))
    views = to_parameters(rows)
    wanted = {name: torch.randn(view.shape).double() for name, view in views.items()}
    for name, view in views.items():
        view.copy_(wanted[name])
    for name, view in to_parameters(rows).items():
        torch.testing.assert_close(view, wanted[name], rtol=0, atol=0)
