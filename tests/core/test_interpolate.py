"""1 / (x + s) in pieces: the error that is promised, on spectra that make it hard."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dattri_core.interpolate import MOST, ROUNDINGS, pieces_of, reach

ALLOWED = {torch.float32: ROUNDINGS * 2.0**-23, torch.float64: ROUNDINGS * 2.0**-52}
SLACK = {torch.float32: 1.001, torch.float64: 3.0}
"""In float64 the comparison itself rounds."""


def rebuilt(pieces):
    """1 / (x + s) as the pieces give it, ``[shifts, n]``."""
    parts = []
    for piece in pieces.pieces:
        functions = pieces.functions(piece, piece.start, piece.stop)
        worth = piece.coefficients
        parts.append(functions if worth is None else worth @ functions)
    return torch.cat(parts, dim=1)


def worst(values, shifts, dtype):
    pieces = pieces_of(values, shifts, dtype)
    got = rebuilt(pieces)
    exact = values + shifts.unsqueeze(1)
    return float((got * exact - 1).abs().max()), pieces


def spectrum(kind, count=3000):
    draw = torch.Generator().manual_seed(count)
    uniform = torch.rand(count, generator=draw, dtype=torch.float64)
    made = {
        "all decades": 10 ** (uniform * 30 - 25),
        "zeros and one": torch.where(uniform < 0.99, 0.0, 1.0).double(),
        "all equal": torch.full((count,), 0.37, dtype=torch.float64),
        "large": 1e6 + uniform,
        "around the dampings": 1e-4 * (1 + 1e4 * uniform),
        "one": uniform[:1],
        "denormal": uniform * 1e-310,
        "negative": uniform * 1e-3 - 5e-5,
        "clusters": 10.0 ** (8 * uniform).floor() * 1e-6 * (1 + 1e-7 * uniform),
    }[kind]
    return made.sort().values


KINDS = (
    "all decades",
    "zeros and one",
    "all equal",
    "large",
    "around the dampings",
    "one",
    "denormal",
    "negative",
    "clusters",
)


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_relative_error_is_within_the_promise_at_every_shift(kind, dtype):
    shifts = torch.logspace(-4, 0, 20, dtype=torch.float64)
    error, pieces = worst(spectrum(kind), shifts, dtype)
    assert error <= ALLOWED[dtype] * SLACK[dtype]
    covered = [(piece.start, piece.stop) for piece in pieces.pieces]
    assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
    assert covered[-1][1] == len(pieces.values)


@settings(max_examples=60, deadline=None)
@given(
    exponents=st.lists(st.floats(-40, 8), min_size=1, max_size=60),
    shifts=st.lists(st.floats(-9, 3), min_size=1, max_size=24),
    dtype=st.sampled_from(list(ALLOWED)),
)
def test_the_promise_holds_for_any_spectrum_and_any_shifts(exponents, shifts, dtype):
    values = 10 ** torch.tensor(exponents, dtype=torch.float64).sort().values
    error, _ = worst(values, 10 ** torch.tensor(shifts, dtype=torch.float64), dtype)
    assert error <= ALLOWED[dtype] * SLACK[dtype]


@pytest.mark.parametrize("terms", range(1, MOST + 1))
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_a_piece_reaches_exactly_as_far_as_its_nodes_serve(terms, tolerance):
    """At the ends of the reach the error is the tolerance: no nearer, and no further."""
    ratio = math.exp(reach(terms, tolerance))
    place = torch.linspace(1, ratio, 20001, dtype=torch.float64)
    angle = (torch.arange(terms, dtype=torch.float64) + 0.5) * math.pi / terms
    nodes = (1 + ratio) / 2 + (ratio - 1) / 2 * angle.cos()
    missed = torch.stack([(place - x) / -x for x in nodes]).prod(0)  # w(d) / w(-s), with s = 0
    assert float(missed.abs().max()) == pytest.approx(tolerance, rel=1e-4)


def test_small_eigenvalues_take_one_product_and_a_wide_spectrum_a_few():
    shifts = torch.logspace(-4, 0, 20, dtype=torch.float64)
    small = pieces_of(torch.linspace(0, 1e-10, 5000, dtype=torch.float64), shifts, torch.float32)
    assert small.columns == 5000
    wide = pieces_of(spectrum("all decades", 100_000), shifts, torch.float32)
    assert wide.columns < 2.5 * 100_000
    few = pieces_of(spectrum("all decades", 40), shifts, torch.float32)
    assert few.columns <= 20 * 40


def test_singular_shifts_are_not_interpolated():
    """x + s changes its sign between the numbers: the pieces are the numbers themselves."""
    values = torch.tensor([-0.5, -0.1, 0.0, 2.0], dtype=torch.float64)
    shifts = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    error, pieces = worst(values, shifts, torch.float32)
    assert error < 1e-15
    assert [piece.coefficients for piece in pieces.pieces] == [None]
