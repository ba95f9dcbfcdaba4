"""Rows at several dampings, against rows that are formed at each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dattri_core import DenseBlock, OuterBlock, SpecError
from dattri_core.blocks import OneHot, SweptBlock, swept

OUTPUTS, INPUTS = 15, 17
DAMPINGS = torch.logspace(-4, 0, 20, dtype=torch.float64)


def randn(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def eigenvalues(seed=0):
    """Half of them far below all dampings, as those of a trained network are."""
    return 10 ** (2 * randn(OUTPUTS, INPUTS, seed=seed) - 6)


def rows(kind, count, seed):
    if kind == "formed":
        return DenseBlock(randn(count, OUTPUTS, INPUTS, seed=seed))
    positions = {"one position": 1, "positions": 3, "one-hot": 2}[kind]
    outputs = randn(count, positions, OUTPUTS, seed=seed)
    if kind == "one-hot":
        draw = torch.Generator().manual_seed(seed)
        return OuterBlock(
            outputs, OneHot(torch.randint(0, INPUTS, (count, 2), generator=draw), INPUTS)
        )
    return OuterBlock(outputs, randn(count, positions, INPUTS, seed=seed + 1))


KINDS = ("formed", "one position", "positions", "one-hot")


def formed(block, spectrum, dampings=DAMPINGS):
    values = block.dense().values
    return torch.cat([values / (spectrum + damping) for damping in dampings])


@pytest.mark.parametrize("ours", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
@pytest.mark.parametrize("limit", [None, 20_000])
def test_inner_products_are_those_of_the_formed_rows(ours, theirs, limit):
    spectrum, left, right = eigenvalues(), rows(ours, 4, 10), rows(theirs, 6, 20)
    swept = SweptBlock(left, spectrum, DAMPINGS)
    exact = formed(left, spectrum)
    want = exact.flatten(1) @ right.flat().T
    size = exact.flatten(1).abs() @ right.flat().abs().T
    for got in (swept.inner(right, limit=limit), right.inner(swept, limit=limit).T):
        assert bool(((got - want).abs() <= 1e-14 * size).all())


@pytest.mark.parametrize("ours", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
def test_rows_of_any_size_keep_their_digits(ours, theirs):
    """Products of small entries, as of rows that a model is sure of, are below float32's range."""
    sizes = 10.0 ** torch.tensor([0, -20, -28, 15], dtype=torch.float64)
    left, right = rows(ours, 4, 10).scale(sizes), rows(theirs, 4, 20).scale(sizes.flip(0))
    left, right = left.to(None, torch.float32), right.to(None, torch.float32)
    found = SweptBlock(left, eigenvalues().float(), DAMPINGS).inner(right)
    exact = formed(left.to(None, torch.float64), eigenvalues().float().double())
    other = right.flat().double()
    want, size = exact.flatten(1) @ other.T, exact.flatten(1).abs() @ other.abs().T
    known = size > 1e-37
    assert 0.5 < known.double().mean() < 0.95 or ours == theirs == "one-hot"
    assert bool(((found - want).abs() <= 1e-6 * size)[known].all())
    assert bool((found[~known].abs() <= 1e-37).all())


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_near_one_so_that_no_product_of_large_ones_is_subnormal(kind):
    block = rows(kind, 4, 10).scale(10.0 ** torch.tensor([0, -20, -28, 15], dtype=torch.float64))
    block = block.to(None, torch.float32)
    entries, scale = swept._entries(block)
    found = entries(torch.arange(OUTPUTS * INPUTS)).T  # [4, d]
    assert bool((scale.log2() == scale.log2().round()).all())
    torch.testing.assert_close(found / scale[:, None], block.flat(), rtol=1e-6, atol=0)
    largest = found.abs().amax(1)
    assert 0.2 < float(largest.min()) <= float(largest.max()) < 2


def test_a_row_of_zeros_and_one_that_is_not_finite():
    left = DenseBlock(torch.stack([torch.zeros(OUTPUTS, INPUTS), torch.ones(OUTPUTS, INPUTS)]))
    right = DenseBlock(left.values.clone())
    right.values[1, 0, 0] = float("inf")
    found = SweptBlock(left, eigenvalues().float(), DAMPINGS).inner(right).view(-1, 2, 2)
    assert bool((found[:, 0, 0] == 0).all()) and bool((found[:, 1, 0] == 0).all())
    assert not bool(found[:, 1, 1].isfinite().any())


def test_these_spectra_are_interpolated():
    """What the tests here compare is not the same product twice."""
    for dtype in (torch.float32, torch.float64):
        block = SweptBlock(rows("formed", 2, 0).to(None, dtype), eigenvalues(), DAMPINGS)
        _, pieces = block._sorted
        assert any(piece.coefficients is not None for piece in pieces.pieces)
        assert pieces.columns < 18 * OUTPUTS * INPUTS


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    count=st.integers(1, 5),
    others=st.integers(0, 5),
    dampings=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=24),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_dampings_any_spectrum(seed, count, others, dampings, dtype):
    spectrum, given_ = eigenvalues(seed), torch.tensor(dampings, dtype=torch.float64)
    left, right = rows("one position", count, seed).to(None, dtype), rows("formed", others, 7)
    right = right.to(None, dtype)
    exact = formed(left.to(None, torch.float64), spectrum, given_)
    theirs = right.flat().double()
    got = SweptBlock(left, spectrum, given_).inner(right).double()
    allowed = 16 * torch.finfo(dtype).eps * (exact.flatten(1).abs() @ theirs.abs().T)
    assert bool(((got - exact.flatten(1) @ theirs.T).abs() <= allowed).all())


@pytest.mark.parametrize("kind", KINDS)
def test_formed_and_taken_rows_are_exact(kind):
    spectrum, block = eigenvalues(), rows(kind, 4, 3)
    swept, want = SweptBlock(block, spectrum, DAMPINGS), formed(block, spectrum)
    assert len(swept) == len(want)
    assert swept.positions is None
    torch.testing.assert_close(swept.dense().values, want, rtol=1e-14, atol=0)
    torch.testing.assert_close(swept.take(slice(8, 12)).values, want[8:12], rtol=1e-14, atol=0)
    chosen = torch.tensor([5, 0, 79])
    torch.testing.assert_close(swept.take(chosen).values, want[chosen], rtol=1e-14, atol=0)
    other = DenseBlock(randn(len(want), OUTPUTS, INPUTS, seed=9))
    paired = (want * other.values).sum((1, 2))
    torch.testing.assert_close(swept.pair_inner(other), paired)
    torch.testing.assert_close(other.pair_inner(swept), paired)
    weights = randn(3, len(want), seed=4)
    torch.testing.assert_close(swept.combine(weights), torch.einsum("cb,boi->coi", weights, want))


def test_two_swept_blocks_meet_as_formed_rows():
    spectrum = eigenvalues()
    left, right = (SweptBlock(rows("positions", 2, k), spectrum, DAMPINGS) for k in (1, 2))
    torch.testing.assert_close(left.inner(right), left.flat() @ right.flat().T)


def test_eigenvalues_of_another_shape_are_refused():
    with pytest.raises(SpecError, match=r"swept block: eigenvalues \(17, 15\)"):
        SweptBlock(rows("formed", 2, 1), eigenvalues().T, DAMPINGS)
