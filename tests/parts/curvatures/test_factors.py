"""Eigenvectors of the factors of K-FAC and EK-FAC, where some coordinates are never used."""

from __future__ import annotations

import pytest
import torch
from dattri_parts.curvatures.factors import eigenvectors
from dattri_parts.curvatures.live import SHARE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dattri_core as dattri
from dattri_core import NumericsError


@settings(max_examples=40, deadline=None)
@given(
    used=st.lists(st.booleans(), max_size=9),
    examples=st.integers(0, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_idle_coordinates_are_their_own_eigenvectors(
    used: list[bool], examples: int, dtype: torch.dtype, seed: int
) -> None:
    """F = Q diag(values) Q^T with Q orthonormal, values rising, and nothing mixed with the idle."""
    size = len(used)
    alive = torch.tensor(used, dtype=torch.bool)
    rows = torch.randn(examples, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    rows[:, ~alive] = 0
    factor = rows.T @ rows
    values, vectors = eigenvectors(factor, "a factor")
    close = {"rtol": 0.0, "atol": 200 * torch.finfo(dtype).eps * max(1, examples)}
    exact = vectors.double()
    assert values.dtype == torch.float64
    assert vectors.dtype == dtype
    assert vectors.is_contiguous()
    torch.testing.assert_close(exact * values @ exact.T, factor.double(), **close)
    torch.testing.assert_close(exact.T @ exact, torch.eye(size, dtype=torch.float64), **close)
    assert bool((values.diff() >= 0).all())
    idle = (factor == 0).all(dim=1)
    if int((~idle).sum()) ** 2 > SHARE * size**2:
        return  # few of them: decomposed whole
    own = vectors[idle]  # each holds a single one, at an eigenvalue of exactly zero
    assert bool(((own == 0) | (own == 1)).all())
    assert bool((own.sum(dim=1) == 1).all())
    assert bool((values @ own.double().T == 0).all())
    assert bool((vectors[~idle][:, own.sum(dim=0) > 0] == 0).all())


def test_a_coordinate_is_idle_where_its_whole_row_is_zero() -> None:
    """One whose squares are lost below the smallest float, and whose products are not, counts."""
    factor = torch.zeros(6, 6)
    factor[1, 4] = factor[4, 1] = 1e-3
    factor[4, 4] = 1
    values, vectors = eigenvectors(factor, "a factor")
    exact = vectors.double()
    torch.testing.assert_close(exact * values @ exact.T, factor.double(), rtol=0, atol=1e-5)


def test_several_matrices_are_decomposed_whole() -> None:
    """The factors of a convolution's groups, one of which is never used in part."""
    rows = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[:2] = 0
    rows[2, :, 2:] = 0
    factor = rows.mT @ rows
    values, vectors = eigenvectors(factor, "a factor")
    torch.testing.assert_close(vectors * values[:, None] @ vectors.mT, factor)


def test_what_is_no_sum_of_squares_is_refused_with_idle_coordinates_too() -> None:
    """An eigenvalue below zero is found among the others."""
    factor = torch.diag(torch.tensor([0.0, -1.0, 2.0, 0.0]))
    with pytest.raises(NumericsError, match="smallest eigenvalue is -1"):
        eigenvectors(factor, "a factor")


def test_a_spectrum_with_idle_coordinates_inverts_as_a_factorisation_does() -> None:
    """Scores of a network most of whose inputs are always zero."""
    torch.manual_seed(0)
    model = nn.Linear(12, 3).double()
    train, test = (
        (torch.randn(n, 12).double() * (torch.arange(12) < 4), torch.randint(3, (n,)))
        for n in (60, 5)
    )
    found = [
        dattri.Method(
            source="per-example",
            inverse_hessian={
                "curvature": {"name": "gauss-newton", "block": True},
                "solver": {"name": solver, "damping": 1e-2},
            },
            scorer="dot",
        )
        .attribute(dattri.Task(model), train, test)
        .values
        for solver in ("spectral", "cholesky")
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
