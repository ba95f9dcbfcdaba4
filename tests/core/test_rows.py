"""Rows of several blocks against their flat float64 rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.blocks import make, same

from dattri_core import BlockSpec, DenseBlock, Rows, Space, SpecError


def world(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    space = Space(
        (
            BlockSpec("a", "outer", (3, 4)),
            BlockSpec("b", "dense", (5,)),
            BlockSpec("c", "outer", (2, 6)),
        )
    )
    outer, formed_outer = make("outer", rows, 2, 3, 4, generator)
    hot, formed_hot = make("one-hot", rows, 3, 2, 6, generator)
    vector = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    flat = torch.cat([formed_outer.flatten(1), vector, formed_hot.flatten(1)], 1)
    aux = {"label": torch.arange(rows) * 10}
    blocks = {"c": hot, "a": outer, "b": DenseBlock(vector)}
    return Rows(space, blocks, torch.arange(rows) + 100, aux), flat


@given(seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_rows_are_their_flat_rows(seed):
    left, flat_left = world(seed, 5)
    right, flat_right = world(seed + 1, 4)
    same(left.flat(), flat_left)  # in the order of the space, not of the mapping
    same(left.inner(right), flat_left @ flat_right.T)
    same(left.inner(right.take(slice(0, 0))), torch.zeros(5, 0, dtype=torch.float64))
    same(left.pair_inner(left), flat_left.square().sum(1))
    again = Rows.from_flat(left.space, flat_left, left.index, left.aux)
    for name in left.space.names:
        same(again.blocks[name].dense().values, left.blocks[name].dense().values)
    picked = left.take(torch.tensor([3, 0]))
    same(picked.flat(), flat_left[[3, 0]])
    assert picked.index.tolist() == [103, 100]
    assert picked.aux["label"].tolist() == [30, 0]
    part = left.select(["c", "a"])
    assert part.space.names == ("a", "c")
    same(part.flat(), torch.cat([flat_left[:, :12], flat_left[:, 17:]], 1))
    assert part.index is left.index
    assert part.aux is left.aux
    joined = Rows.concatenate([left, right])
    same(joined.flat(), torch.cat([flat_left, flat_right]))
    assert joined.index.tolist() == [*range(100, 105), *range(100, 104)]
    assert left.to(dtype=torch.float32).dtype == torch.float32
    same(left.scale(torch.arange(5.0)).flat(), torch.arange(5.0).double()[:, None] * flat_left)
    assert left.nbytes == 8 * (5 * 2 * (3 + 4) + 5 * 5 + 5 * 3 * (2 + 1))


def test_rows_refuse_what_does_not_fit():
    rows, flat = world(0, 3)
    with pytest.raises(SpecError, match="do not match the space"):
        Rows(rows.space, {"a": rows.blocks["a"]}, rows.index)
    with pytest.raises(SpecError, match="index 2 rows"):
        Rows(rows.space, rows.blocks, rows.index[:2])
    with pytest.raises(SpecError, match=r"aux \['label'\]"):
        Rows(rows.space, rows.blocks, rows.index, {"label": torch.zeros(2)})
    with pytest.raises(SpecError, match=r"needs \[B, 29\]"):
        Rows.from_flat(rows.space, flat[:, :-1], rows.index)
    other = Rows.from_flat(Space((BlockSpec("z", "dense", (29,)),)), flat, rows.index)
    for meet in (lambda: rows.inner(other), lambda: rows.pair_inner(other)):
        with pytest.raises(SpecError, match="differ at block 'a'"):
            meet()
    with pytest.raises(SpecError, match="concatenate rows"):
        Rows.concatenate([rows, other])
    with pytest.raises(SpecError, match=r"no block \['z'\]"):
        rows.select(["a", "z"])
