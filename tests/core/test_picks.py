"""Single entries of rows and selections of a side, for every kind of block, against formed rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.blocks import FACTORED, KINDS, make, same

from dattri_core import DenseBlock, OneHot, OuterBlock, Selection, pick_entries
from dattri_core.blocks import pick

sizes = st.integers(1, 5)
counts = st.integers(0, 4)


@pytest.mark.parametrize("cheap", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@given(
    b=counts, t=counts, o=sizes, i=sizes, limit=st.sampled_from([1, 64, 400, 2**28]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_entries_are_those_of_the_formed_rows(kind, cheap, b, t, o, i, limit, seed):
    generator = torch.Generator().manual_seed(seed)
    block, formed = make(kind, b, t, o, i, generator)
    count = int(torch.randint(o * i + 1, (1,), generator=generator))
    places = torch.randperm(o * i, generator=generator)[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pick, "_is_cheaper", lambda *_: cheap)
        same(pick_entries(block, places, limit=limit), formed.reshape(b, o * i)[:, places])


@pytest.mark.parametrize("kind", ["outer", "one-hot", "grouped"])
def test_few_entries_are_read_from_factors_and_many_from_formed_rows(kind, monkeypatch):
    block, formed = make(kind, 3, 2, 40, 50, torch.Generator().manual_seed(0))
    monkeypatch.setattr(type(block), "dense", lambda self: pytest.fail("was formed"))
    places = torch.tensor([0, 7, 1999])
    same(pick_entries(block, places), formed.reshape(3, 2000)[:, places])
    with pytest.raises(pytest.fail.Exception, match="was formed"):
        pick_entries(block, torch.arange(2000))


def test_entries_of_half_precision_are_added_up_in_float32():
    block = OuterBlock(torch.full((1, 300, 400), 200.0).half(), torch.ones(1, 300, 400).half())
    found = pick_entries(block, torch.tensor([5, 159_999]))
    assert found.dtype == torch.float32
    assert found.tolist() == [[60_000.0, 60_000.0]]


def written(chosen, dtype=torch.float64):
    """Return the matrix of a selection."""
    matrix = torch.zeros(len(chosen.index), chosen.size, dtype=dtype)
    for row, column in enumerate(chosen.index.tolist()):
        matrix[row, column] = chosen.scale
    return matrix


@pytest.mark.parametrize("kind", KINDS)
@given(b=counts, t=counts, o=sizes, i=sizes, seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_selections_of_sides_are_their_matrices(kind, b, t, o, i, seed):
    generator = torch.Generator().manual_seed(seed)
    block, formed = make(kind, b, t, o, i, generator)
    sides = []
    for size in (i, o):
        count = int(torch.randint(1, size + 1, (1,), generator=generator))
        index = torch.randperm(size, generator=generator)[:count].sort().values
        sides.append(Selection(index, size, 1.5))
    inputs, outputs = sides
    mapped = block.map(inputs, outputs)
    left, right = written(outputs), written(inputs)
    want = left @ formed @ right.T
    same(mapped.dense().values, want)
    same(block.map(inputs, None).dense().values, formed @ right.T)
    if kind in FACTORED:
        assert isinstance(mapped, OuterBlock)
    raised = DenseBlock(want).map(inputs.transposed, outputs.transposed)
    same(raised.dense().values, left.T @ want @ right)
    same(mapped.map(inputs.transposed, outputs.transposed).dense().values, left.T @ want @ right)


def test_a_selection_of_indices_makes_no_one_hot_vector(monkeypatch):
    monkeypatch.setattr(OneHot, "dense", lambda self, dtype: pytest.fail("was made dense"))
    block = OuterBlock(
        torch.ones(1, 4, 2).half(), OneHot(torch.tensor([[3, 9, 3, 50_000]]), 50_001)
    )
    mapped = block.map(Selection(torch.tensor([3, 4, 50_000]), 50_001, 2.0), None)
    assert mapped.inputs.dtype == torch.float32
    assert mapped.inputs.tolist() == [[[2, 0, 0], [0, 0, 0], [2, 0, 0], [0, 0, 2]]]
