"""The inverse of w G^T G + damping I from inner products of the rows of G."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from attrs import define
from torch import Tensor

from dattri_core import Block, NumericsError, Rows, SpanBlock, SumBlock
from dattri_parts.solvers.factor import power_iteration, require_regular
from dattri_parts.solvers.held import squares_of

TILE = 2048
"""Rows and columns of a Gram matrix that are computed at once."""


@define(eq=False)
class Dual:
    """(h - G^T (G G^T + damping/w I)^-1 G h) / damping; one factor is held, never the matrix.

    Args:
        blocks: Of the rows of G, those that are inverted together.
        size: Numbers of a row.
        weight: w.
        trace: Of w G^T G.
        dtype: In which products of rows are summed.
        negligible: Rows that were left out.
    """

    blocks: Mapping[str, Block]
    size: int
    weight: float
    trace: float
    dtype: torch.dtype
    negligible: int
    kind: ClassVar[str] = "dual"
    _largest: float = 0.0  # eigenvalue of G G^T
    _shift: float | None = None  # of the factor
    _lower: Tensor | None = None  # [m, m]
    _spectrum: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def of(blocks: Mapping[str, Block], size: int, weight: float, dtype: torch.dtype) -> Dual:
        """Return the dual of some rows, without those that together are rounding of the largest.

        What is left out of G^T G has a norm of the precision times the largest squared row at most,
        which is no more than the rounding of its largest eigenvalue. A classifier that is sure of
        most examples has many such rows.

        Raises:
            NumericsError: A row is not finite.
        """
        squares = squares_of(list(blocks.values()))
        trace = weight * float(squares.sum())
        if not torch.isfinite(squares).all():
            raise NumericsError(
                f"solver 'woodbury': rows of the curvature are not finite in {list(blocks)}; look "
                "for a diverged checkpoint"
            )
        ordered, place = squares.sort()
        small = ordered.cumsum(0) <= torch.finfo(dtype).eps * ordered[-1:]
        chosen = place[~small].sort().values
        if len(chosen) < len(squares):
            blocks = {name: block.take(chosen) for name, block in blocks.items()}
        return Dual(blocks, size, weight, trace, dtype, int(small.sum()))

    @property
    def rows(self) -> int:
        """Return the number of rows m."""
        return len(next(iter(self.blocks.values())))

    @property
    def row_bytes(self) -> int:
        """Return the bytes of the rows."""
        return sum(block.nbytes for block in self.blocks.values())

    @property
    def nbytes(self) -> int:
        """Return the bytes of the rows and of the factor."""
        return self.row_bytes + 8 * self.rows**2

    def factorise(self, damping: float) -> None:
        """Hold a Cholesky factor of G G^T + damping/w I."""
        shift = damping / self.weight
        if self._shift == shift and self._lower is not None:
            return
        self._lower = None  # the one before goes first
        matrix = gram(list(self.blocks.values()))
        if not self._largest and self.trace > 0:
            self._largest = power_iteration(lambda v: matrix @ v, matrix)
        self._lower, self._shift = _cholesky(matrix, shift), shift

    def rounding(self, damping: float) -> float:
        """Return the error of a score relative to |g| |h| / damping, from rounding of products.

        Raises:
            NumericsError: It is all of it.
        """
        precision = torch.finfo(self.dtype).eps
        greatest = self.weight * self._largest + damping
        require_regular(damping, greatest, precision, damping)
        return precision * greatest / damping

    def invert(
        self, rows: Rows, names: Sequence[str], damping: float, *, spectral: bool
    ) -> dict[str, Block]:
        """Return some blocks of the inverse times every row, as the row and a combination of G's.

        Args:
            rows: C rows.
            names: Those of the blocks that the rows hold.
            damping: lambda.
            spectral: Solve with eigenvectors, which serve any damping.
        """
        first = next(iter(self.blocks.values()))
        met = torch.zeros(self.rows, len(rows), dtype=torch.float64, device=first.device)
        for name in names:
            base = self.blocks[name]
            met += base.inner(rows.blocks[name].to(base.device, base.dtype))
        solved = self._solve(met, damping, spectral=spectral)
        coefficients = solved.mT.div(-damping).to(self.dtype)
        scale = torch.full((len(rows),), 1 / damping, dtype=torch.float64)
        found: dict[str, Block] = {}
        for name in names:
            own = rows.blocks[name]
            span = SpanBlock(coefficients, self.blocks[name]).to(own.device, own.dtype)
            found[name] = SumBlock((own.scale(scale), span))
        return found

    def _solve(self, vectors: Tensor, damping: float, *, spectral: bool) -> Tensor:
        if not self.rows:
            return vectors
        if spectral:
            if self._spectrum is None:
                self._lower = self._shift = None
                self._spectrum = torch.linalg.eigh(gram(list(self.blocks.values())))
            values, basis = self._spectrum  # of a Gram matrix: below zero is rounding
            shifted = values.clamp_min(0) + damping / self.weight
            return basis @ ((basis.mT @ vectors) / shifted.unsqueeze(1))
        self.factorise(damping)
        assert self._lower is not None
        return torch.cholesky_solve(vectors, self._lower)


def gram(blocks: Sequence[Block]) -> Tensor:
    """Return all inner products of rows with each other, summed over blocks: ``[m, m]`` in float64.

    Each product is computed in the dtype of the blocks' own sums, tile by tile; tiles below the
    diagonal are mirrored.
    """
    count, device = len(blocks[0]), blocks[0].device
    matrix = torch.empty(count, count, dtype=torch.float64, device=device)
    for top in range(0, count, TILE):
        rows = slice(top, min(top + TILE, count))
        upper = [block.take(rows) for block in blocks]
        for left in range(top, count, TILE):
            columns = slice(left, min(left + TILE, count))
            other = upper if left == top else [block.take(columns) for block in blocks]
            total = upper[0].inner(other[0])
            for one, two in zip(upper[1:], other[1:], strict=True):
                total += one.inner(two)
            matrix[rows, columns] = total
            if left != top:
                matrix[columns, rows] = total.mT
    return matrix


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
