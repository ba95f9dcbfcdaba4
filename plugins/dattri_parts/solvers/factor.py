"""Inverses of dense symmetric matrices: a triangular factor, or eigenvalues when indefinite."""

from __future__ import annotations

import torch
from attrs import frozen
from scipy.linalg.lapack import dpotrf
from torch import Tensor

from dattri_core import (
    MemoryBudgetError,
    NumericsError,
    Operator,
    RoundedOperator,
    format_bytes,
    free_bytes,
)

PROBES, STEPS = 4, 2
"""Vectors and steps of the power iterations that estimate the extreme eigenvalues."""
TILE = 1024
"""Rows and columns that are mirrored at once."""


@frozen(eq=False)
class Triangular:
    """A = L L^T."""

    lower: Tensor  # [d, d]; nothing above its diagonal is read
    least: float
    greatest: float

    def solve(self, vectors: Tensor) -> Tensor:
        """Return A^-1 v for every row v, ``[C, d]``."""
        return solve_with(self.lower, vectors.mT).mT


@frozen(eq=False)
class Spectrum:
    """H = Q diag(values) Q^T and a damping; one decomposition serves any number of dampings."""

    values: Tensor  # [d]
    basis: Tensor  # [d, d]
    damping: float

    @property
    def shifted(self) -> Tensor:
        """Return the eigenvalues of H + damping I."""
        return self.values + self.damping

    @property
    def least(self) -> float:
        """Return the eigenvalue of H + damping I that is nearest to zero, without its sign."""
        return float(self.shifted.abs().min())

    @property
    def greatest(self) -> float:
        """Return the eigenvalue of H + damping I that is furthest from zero, without its sign."""
        return float(self.shifted.abs().max())

    def solve(self, vectors: Tensor) -> Tensor:
        """Return (H + damping I)^-1 v for every row v, ``[C, d]``."""
        return (vectors @ self.basis / self.shifted) @ self.basis.mT

    def root(self, vectors: Tensor) -> Tensor:
        """Return (H + damping I)^-1/2 v for every row v, ``[C, d]``; all eigenvalues positive."""
        return (vectors @ self.basis / self.shifted.sqrt()) @ self.basis.mT


def triangular(matrix: Tensor, damping: float, *, over: bool = False) -> Triangular | None:
    """Return the Cholesky factor of H + damping I, or None when it is not positive definite.

    Args:
        matrix: H, ``[d, d]`` in float64. Its diagonal is changed while this runs, so that no copy
            is made.
        damping: Of the diagonal.
        over: Write the factor over the lower triangle and the diagonal of ``matrix``, which must
            be contiguous and on the CPU; what is above the diagonal stays.
    """
    diagonal = matrix.diagonal().clone()
    try:
        matrix.diagonal().add_(damping)
        greatest = power_iteration(lambda v: matrix @ v, matrix)
        if over:
            # The transpose is the array that LAPACK wants, and its upper triangle our lower one.
            _, failed = dpotrf(matrix.numpy().T, lower=0, clean=0, overwrite_a=1)
            lower = matrix
        else:
            lower, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            return None
        least = 1 / power_iteration(lambda v: solve_with(lower, v), matrix)
    finally:
        if not over:
            matrix.diagonal().copy_(diagonal)
    return Triangular(lower, least, greatest)


def mirror(matrix: Tensor, diagonal: Tensor) -> None:
    """Make a matrix symmetric again from what is above its diagonal, tile by tile."""
    for top in range(0, len(matrix), TILE):
        rows = slice(top, top + TILE)
        for left in range(top, len(matrix), TILE):
            columns = slice(left, left + TILE)
            upper = matrix[rows, columns]
            matrix[columns, rows] = (upper.triu(1) + upper.triu(1).mT) if left == top else upper.mT
    matrix.diagonal().copy_(diagonal)


def solve_with(lower: Tensor, columns: Tensor) -> Tensor:
    """Return (L L^T)^-1 V; `torch.cholesky_solve` would copy L for each V.

    Args:
        lower: L, ``[d, d]``; what is above its diagonal is not read.
        columns: V, ``[d, C]``.
    """
    half = torch.linalg.solve_triangular(lower, columns, upper=False)
    answer: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return answer


def spectrum(matrix: Tensor, damping: float) -> Spectrum:
    """Return the eigendecomposition of H.

    Raises:
        MemoryBudgetError: It does not fit the memory that is free.
    """
    needed = 4 * matrix.numel() * matrix.element_size()
    free = free_bytes(matrix.device)
    if needed > free:
        raise MemoryBudgetError(
            f"eigendecomposition of an indefinite {len(matrix)} x {len(matrix)} curvature: needs "
            f"{format_bytes(needed)}, {format_bytes(free)} are free; give more damping or the "
            "curvature 'ggn', so that a Cholesky factor exists, or the solver 'cg'"
        )
    values, basis = torch.linalg.eigh(matrix)
    return Spectrum(values, basis, damping)


def power_iteration(function: object, like: Tensor) -> float:
    """Return an estimate from below of the largest eigenvalue of a positive operator."""
    assert callable(function)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(like), PROBES, generator=generator, dtype=like.dtype).to(like.device)
    norm = block.norm(dim=0)
    for _ in range(STEPS):
        block = function(block / norm)
        norm = block.norm(dim=0)
    return float(norm.max())


def precision_of(operator: Operator) -> float:
    """Return how far an operator's numbers are rounded, relative to its largest eigenvalue."""
    own: float = torch.finfo(operator.dtype).eps
    return max(own, operator.precision()) if isinstance(operator, RoundedOperator) else own


def require_regular(
    least: float, greatest: float, precision: float, damping: float, *, squares: bool = False
) -> None:
    """Raise `NumericsError` when H + damping I is singular to the precision of its entries.

    Args:
        least: Size of the smallest eigenvalue of H + damping I.
        greatest: Of the largest.
        precision: To which H is known, relative to its largest eigenvalue.
        damping: lambda.
        squares: Whether H is a sum of squares, which no other curvature makes more definite.
    """
    if least > precision * greatest:
        return
    needed = precision * greatest
    other = "" if squares else "the curvature 'ggn' if the Hessian is indefinite, "
    raise NumericsError(
        f"curvature + damping: singular to working precision (damping {damping:.3g}; the "
        f"eigenvalues of H + damping I have sizes from {least:.3g} to {greatest:.3g}, and H is "
        f"known to {precision:.1g} of its largest); give a damping above {needed:.1g}, "
        f"{other}or model.double() for more precision"
    )
