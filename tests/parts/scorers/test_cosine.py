"""Cosines of rows whose squares underflow: right from the train side, told of at the queries."""

import warnings

import pytest
import torch
from oracles.toy_tasks import cross_entropies, flat_gradients, normal
from torch import nn

import dattri_core as dattri
from dattri_core import DenseBlock, OuterBlock, Task
from dattri_core.blocks import SpanBlock
from dattri_core.measures import without_underflow


def sure(scale):
    """Return a layer, and an example whose gradient has about the length exp(-scale)."""
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3))
    return layer, (torch.tensor([[scale, 0.0, 0.3]]), torch.tensor([0]))


def others(count=6):
    return normal(count, 3, seed=1).float(), torch.arange(count) % 3


def cosines(layer, train, test):
    wide = layer.double()
    rows, queries = (
        flat_gradients(wide, cross_entropies((x.double(), y))) for x, y in (train, test)
    )
    layer.float()
    norms = rows.norm(dim=1, keepdim=True) * queries.norm(dim=1)
    return rows @ queries.T / norms


@pytest.mark.parametrize("scale", [10.0, 50.0, 60.0])
def test_train_rows_whose_squares_underflow_have_their_cosines(scale):
    """|g| = 1e-25 in float32: |g|^2 is zero, and the cosine is not."""
    layer, example = sure(scale)
    want = cosines(layer, example, others())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = dattri.attribute(Task(layer), example, others(), method="grad-cos").values
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-3  # of float32's softmax
    assert want.abs().max() > 0.25


@pytest.mark.parametrize("scale", [10.0, 60.0])
def test_queries_whose_squares_underflow_are_told_of(scale):
    layer, example = sure(scale)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        dattri.attribute(Task(layer), others(), example, method="grad-cos")
    assert any("underflow" in str(each.message) for each in told) == (scale > 50)


def test_a_row_of_zeros_is_no_underflow():
    layer, _ = sure(1.0)
    zero = torch.zeros(2, 3), torch.tensor([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = dattri.attribute(Task(layer), others(), zero, method="grad-cos")
    assert not scores.values.any()


@pytest.mark.parametrize("kind", ["dense", "outer", "span"])
def test_squared_lengths_that_underflow_are_taken_in_float64(kind):
    length = torch.tensor([1.0, 1e-12, 0.0, 1e-25]).reshape(-1, 1, 1)
    outputs, inputs = normal(4, 2, 3, seed=2).float() * length, normal(4, 2, 5, seed=3).float()
    block = OuterBlock(outputs, inputs)
    if kind == "dense":
        block = block.dense()
    if kind == "span":
        block = SpanBlock(torch.eye(4), block)
    formed = (outputs.double().mT @ inputs.double()).flatten(1)
    got = without_underflow(block.pair_inner(block), block)
    want = formed.square().sum(1)
    assert torch.allclose(got, want, rtol=1e-5, atol=0)
    long = DenseBlock(normal(3, 4, seed=1).float())
    squares = long.pair_inner(long)
    assert without_underflow(squares, long) is squares
