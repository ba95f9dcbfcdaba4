"""The matrix of inner products of rows, solved with a multiple of the identity added."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import define
from torch import Tensor

from dattri_core import NumericsError, RowsOperator
from dattri_parts.solvers.factor import power_iteration, precision_of, require_regular, solve_with

COLUMNS = 512
"""Of the inverse of a factor that are computed at once."""


@define(eq=False)
class Kernel:
    """(G G^T + damping/w I)^-1 for the m rows G of H = w G^T G; one factor is held.

    Args:
        rows: m.
        weight: w.
        trace: Of H.
        dtype: In which combinations of rows are taken.
        precision: To which H is known, relative to its largest eigenvalue.
        matrix: Makes G G^T, ``[m, m]`` in float64, which is overwritten.
    """

    rows: int
    weight: float
    trace: float
    dtype: torch.dtype
    precision: float
    matrix: Callable[[], Tensor]
    _largest: float = 0.0  # eigenvalue of G G^T
    _shift: float | None = None  # of the factor
    _lower: Tensor | None = None  # [m, m]
    _spectrum: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def of(operator: RowsOperator, rows: int, trace: float, matrix: Callable[[], Tensor]) -> Kernel:
        """Return the kernel of some rows of an operator."""
        precision = precision_of(operator)
        return Kernel(rows, operator.weight, trace, operator.dtype, precision, matrix)

    def factorise(self, damping: float) -> None:
        """Hold a Cholesky factor of G G^T + damping/w I."""
        shift = damping / self.weight
        if self._shift == shift and self._lower is not None:
            return
        self._lower = None  # the one before goes first
        matrix = self.matrix()
        if not self._largest and self.trace > 0:
            self._largest = power_iteration(lambda v: matrix @ v, matrix)
        self._lower, self._shift = _cholesky(matrix, shift), shift

    def rounding(self, damping: float) -> float:
        """Return the error of a score relative to |g| |h| / damping, from rounding of products.

        Raises:
            NumericsError: It is all of it.
        """
        greatest = self.weight * self._largest + damping
        require_regular(damping, greatest, self.precision, damping, squares=True)
        return self.precision * greatest / damping

    @property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues and eigenvectors of G G^T, computed once; no factor is held beside."""
        if self._spectrum is None:
            self._lower = self._shift = None
            values, basis = torch.linalg.eigh(self.matrix())
            self._spectrum = values.clamp_min(0), basis  # of a Gram matrix: below zero is rounding
        return self._spectrum

    def leverages(self, damping: float, *, spectral: bool) -> Tensor:
        """Return the diagonal of G G^T (G G^T + damping/w I)^-1, ``[m]`` in float64, in 0 .. 1.

        Args:
            damping: lambda.
            spectral: By the eigenvectors, which serve any damping.
        """
        shift = damping / self.weight
        if spectral:
            values, basis = self.spectrum
            return basis.square() @ (values / (values + shift))
        self.factorise(damping)
        assert self._lower is not None
        found = torch.empty_like(self._lower[:, 0])
        for start in range(0, self.rows, COLUMNS):  # of the identity
            few = min(COLUMNS, self.rows - start)
            # Rows of L^-1 above the first of these columns are zero in them.
            corner = torch.eye(self.rows - start, few, dtype=found.dtype, device=found.device)
            lower = self._lower[start:, start:]
            part = torch.linalg.solve_triangular(lower, corner, upper=False)
            found[start : start + few] = part.square().sum(0)
        return found.mul_(-shift).add_(1)

    def solve(self, vectors: Tensor, damping: float, *, spectral: bool) -> Tensor:
        """Return (G G^T + damping/w I)^-1 v for every column v, ``[m, C]`` in float64.

        Args:
            vectors: ``[m, C]``.
            damping: lambda.
            spectral: Solve with eigenvectors, which serve any damping.
        """
        if not self.rows:
            return vectors
        if spectral:
            values, basis = self.spectrum
            shifted = values + damping / self.weight
            return basis @ ((basis.mT @ vectors) / shifted.unsqueeze(1))
        self.factorise(damping)
        assert self._lower is not None
        return solve_with(self._lower, vectors)


def _cholesky(matrix: Tensor, shift: float) -> Tensor:
    """Return L with L L^T = matrix + shift I, in place of the matrix."""
    lower = matrix.mT  # the layout of LAPACK: no copy is made
    lower.diagonal().add_(shift)
    failed = torch.zeros((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if int(failed):
        raise NumericsError(
            f"solver 'woodbury': the Gram matrix of {len(matrix)} rows plus {shift:.3g} is not "
            "positive definite to the precision of its entries; give more damping, or use "
            "model.double()"
        )
    return lower
