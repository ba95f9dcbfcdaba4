"""The inverse of w G^T G + damping I from inner products of the rows of G."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from attrs import define, field
from torch import Tensor

from dattri_core import Block, NumericsError, Rows, RowsOperator, SpanBlock, SumBlock
from dattri_parts.solvers.held import squares_of
from dattri_parts.solvers.kernel import Kernel

TILE = 2048
"""Rows and columns of a Gram matrix that are computed at once."""


@define(eq=False)
class Dual:
    """(h - G^T (G G^T + damping/w I)^-1 G h) / damping.

    Where rows are held so is one factor, and the matrix is made anew; where they are read again
    (`Reread`), the matrix is kept beside its factor.

    Args:
        blocks: Of the rows of G, those that are inverted together; none where they are not held.
        size: Numbers of a row.
        kernel: G G^T.
        negligible: Rows that were left out.
    """

    blocks: Mapping[str, Block]
    size: int
    kernel: Kernel
    negligible: int
    kind: ClassVar[str] = "dual"
    _turned: Mapping[str, SpanBlock] = field(factory=dict, init=False)  # Q^T G

    @staticmethod
    def of(blocks: Mapping[str, Block], size: int, operator: RowsOperator) -> Dual:
        """Return the dual of some rows, without those that together are rounding of the largest.

        What is left out of G^T G has a norm of the precision times the largest squared row at most,
        which is no more than the rounding of its largest eigenvalue. A classifier that is sure of
        most examples has many such rows.

        Raises:
            NumericsError: A row is not finite.
        """
        squares = squares_of(list(blocks.values()))
        trace = operator.weight * float(squares.sum())
        require_finite(squares, list(blocks))
        ordered, place = squares.sort()
        small = ordered.cumsum(0) <= torch.finfo(operator.dtype).eps * ordered[-1:]
        chosen = place[~small].sort().values
        if len(chosen) < len(squares):
            blocks = {name: block.take(chosen) for name, block in blocks.items()}
        parts = list(blocks.values())
        kernel = Kernel.of(operator, len(parts[0]), trace, lambda: gram(parts))
        return Dual(blocks, size, kernel, int(small.sum()))

    @property
    def rows(self) -> int:
        """Return the number of rows m."""
        return self.kernel.rows

    @property
    def row_bytes(self) -> int:
        """Return the bytes of the rows."""
        return sum(block.nbytes for block in self.blocks.values())

    @property
    def nbytes(self) -> int:
        """Return the bytes of the rows and of the factor, or of the matrix and its factor."""
        return self.row_bytes + (8 if self.blocks else 16) * self.rows**2

    @property
    def trace(self) -> float:
        """Return the trace of w G^T G."""
        return self.kernel.trace

    def factorise(self, damping: float) -> None:
        """Hold a factor for a damping."""
        self.kernel.factorise(damping)

    def self_influence(self, damping: float, *, spectral: bool) -> Tensor:
        """Return <g, (H + damping I)^-1 g> of every row g of G, ``[m]`` in float64."""
        return self.kernel.leverages(damping, spectral=spectral).div_(self.kernel.weight)

    def rounding(self, damping: float) -> float:
        """Return the error of a score from rounding; see `Kernel.rounding`."""
        return self.kernel.rounding(damping)

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
        solved = self.kernel.solve(self._met(rows, names), damping, spectral=spectral)
        coefficients = solved.mT.div(-damping).to(self.kernel.dtype)
        scale = torch.full((len(rows),), 1 / damping, dtype=torch.float64)
        found: dict[str, Block] = {}
        for name in names:
            own = rows.blocks[name]
            span = SpanBlock(coefficients, self.blocks[name]).to(own.device, own.dtype)
            found[name] = SumBlock((own.scale(scale), span))
        return found

    def invert_each(
        self, rows: Rows, names: Sequence[str], dampings: Sequence[float]
    ) -> list[dict[str, Block]]:
        """Return the same at several dampings, as combinations of the eigenvectors of G^T G.

        Those are combinations of the rows of G, Q^T G, the same at every damping.
        """
        values, basis = self.kernel.spectrum
        if not self._turned:
            turn = basis.mT.to(self.kernel.dtype)
            self._turned = {name: SpanBlock(turn, block) for name, block in self.blocks.items()}
        turned = self._met(rows, names).mT @ basis  # [C, m]
        found: list[dict[str, Block]] = []
        for damping in dampings:
            worth = turned / (-damping * (values + damping / self.kernel.weight))
            scale = torch.full((len(rows),), 1 / damping, dtype=torch.float64)
            blocks: dict[str, Block] = {}
            for name in names:
                own = rows.blocks[name]
                span = SpanBlock(worth.to(self.kernel.dtype), self._turned[name])
                blocks[name] = SumBlock((own.scale(scale), span.to(own.device, own.dtype)))
            found.append(blocks)
        return found

    def _met(self, rows: Rows, names: Sequence[str]) -> Tensor:
        """Return G h, ``[m, C]`` in float64."""
        first = next(iter(self.blocks.values()))
        met = torch.zeros(self.rows, len(rows), dtype=torch.float64, device=first.device)
        for name in names:
            base = self.blocks[name]
            met += base.inner(rows.blocks[name].to(base.device, base.dtype))
        return met


def gram(blocks: Sequence[Block], limit: int | None = None) -> Tensor:
    """Return all inner products of rows with each other, summed over blocks: ``[m, m]`` in float64.

    Each product is computed in the dtype of the blocks' own sums, tile by tile; tiles below the
    diagonal are mirrored.

    Args:
        blocks: Of m rows.
        limit: Bytes of intermediates; see `Block.inner`.
    """
    count, device = len(blocks[0]), blocks[0].device
    matrix = torch.empty(count, count, dtype=torch.float64, device=device)
    for top in range(0, count, TILE):
        rows = slice(top, min(top + TILE, count))
        upper = [block.take(rows) for block in blocks]
        for left in range(top, count, TILE):
            columns = slice(left, min(left + TILE, count))
            other = upper if left == top else [block.take(columns) for block in blocks]
            total = upper[0].inner(other[0], limit=limit)
            for one, two in zip(upper[1:], other[1:], strict=True):
                total += one.inner(two, limit=limit)
            matrix[rows, columns] = total
            if left != top:
                matrix[columns, rows] = total.mT
    return matrix


def require_finite(squares: Tensor, names: Sequence[str]) -> None:
    """Raise `NumericsError` when the squared length of a row is not finite."""
    if not torch.isfinite(squares).all():
        raise NumericsError(
            f"solver 'woodbury': rows of the curvature are not finite in {list(names)}; look for a "
            "diverged checkpoint"
        )
