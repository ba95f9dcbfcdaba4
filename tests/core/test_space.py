"""Spaces: offsets, selection, fingerprints."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dattri_core import BlockSpec, ParameterView, Rows, Space, SpecError


def view(name, start, stop, rows=3, transposed=False):
    return ParameterView(name, (rows, stop - start), start, stop, transposed)


BASE = Space(
    (
        BlockSpec("a", "outer", (3, 5), (view("a.weight", 0, 4), view("a.bias", 4, 5))),
        BlockSpec("b", "dense", (2, 2, 2), (ParameterView("b", (2, 2, 2), 0, 4),)),
        BlockSpec("c", "dense", (), (ParameterView("c", (), 0, 1),)),
    )
)


def test_sizes_and_offsets():
    assert BASE.names == ("a", "b", "c")
    assert BASE.dim == 15 + 8 + 1
    assert BASE.offsets == {"a": 0, "b": 15, "c": 23}
    assert BASE["b"].matrix_shape == (2, 4)
    assert BASE["c"].matrix_shape == (1, 1)
    assert BASE.parameter_names == ("a.weight", "a.bias", "b", "c")
    assert BASE.covers_parameters
    assert "b" in BASE
    assert "z" not in BASE
    assert len(BASE) == 3


def test_a_block_with_a_gap_does_not_cover_parameters():
    assert not Space((BlockSpec("a", "outer", (3, 5), (view("w", 0, 4),)),)).covers_parameters
    assert not Space((BlockSpec("a", "dense", (3,)),)).covers_parameters


VARIANTS = [
    BASE,
    Space(BASE.blocks[::-1]),
    Space(BASE.blocks[:2]),
    Space((BlockSpec("a", "dense", (3, 5), BASE["a"].parameters), *BASE.blocks[1:])),
    Space((BlockSpec("a", "outer", (5, 3), BASE["a"].parameters), *BASE.blocks[1:])),
    Space((BlockSpec("x", "outer", (3, 5), BASE["a"].parameters), *BASE.blocks[1:])),
    Space((BlockSpec("a", "outer", (3, 5), BASE["a"].parameters[::-1]), *BASE.blocks[1:])),
    Space((BlockSpec("a", "outer", (3, 5)), *BASE.blocks[1:])),
    Space(
        (
            BlockSpec("a", "outer", (3, 5), (view("a.weight", 0, 4, transposed=True),)),
            *BASE.blocks[1:],
        )
    ),
]


def test_fingerprints_tell_spaces_apart():
    assert len({space.fingerprint for space in VARIANTS}) == len(VARIANTS)
    assert Space(tuple(BASE.blocks)).fingerprint == BASE.fingerprint
    # Frozen: saved files depend on it.
    assert (
        Space((BlockSpec("a", "dense", (3,)),)).fingerprint
        == Space([BlockSpec("a", "dense", [3])]).fingerprint
    )


@pytest.mark.parametrize(("left", "right"), list(itertools.permutations(VARIANTS, 2)))
def test_spaces_that_differ_never_meet(left, right):
    with pytest.raises(SpecError, match="scores: the spaces"):
        left.require_same(right, "scores")


def test_equal_spaces_meet():
    BASE.require_same(Space(BASE.blocks), "scores")


def test_the_difference_is_named_even_when_shapes_agree():
    with pytest.raises(SpecError, match="parameters"):
        BASE.require_same(VARIANTS[6], "scores")


@given(st.sets(st.sampled_from(["a", "b", "c"])))
def test_selection_keeps_the_order_of_the_space(names):
    chosen = BASE.select(sorted(names, reverse=True))
    assert chosen.names == tuple(sorted(names))
    assert all(chosen[name] == BASE[name] for name in names)


def test_bad_spaces_are_refused():
    with pytest.raises(SpecError, match="two blocks are named 'a'"):
        Space((BASE["a"], BASE["a"]))
    with pytest.raises(SpecError, match="outer block has shape"):
        BlockSpec("a", "outer", (3,))
    with pytest.raises(SpecError, match=r"no block \['z'\]; blocks: a, b, c"):
        BASE.select(["z", "a"])
    with pytest.raises(SpecError, match="no block 'z'"):
        BASE["z"]


def test_rows_are_cut_in_the_order_of_the_space():
    import torch

    flat = torch.arange(24.0)[None]
    rows = Rows.from_flat(BASE, flat, torch.tensor([0]))
    assert rows.blocks["a"].values.flatten().tolist() == list(range(15))
    assert rows.blocks["b"].values.shape == (1, 2, 2, 2)
    assert rows.blocks["c"].values.tolist() == [23.0]
