"""The inverse of w G^T G + damping I where G has more rows than columns: the matrix itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import torch
from attrs import define
from torch import Tensor

from dattri_core import Block, NumericsError, Rows, Space
from dattri_parts.solvers.factor import (
    power_iteration,
    require_regular,
    solve_with,
    triangular,
)


@define(eq=False)
class Primal:
    """H = w G^T G in float64, with a factor of H + damping I.

    Args:
        space: Of the blocks that are inverted together.
        matrix: H, ``[d, d]``.
        rows: How many it was made of.
        precision: To which H is known, relative to its largest eigenvalue.
    """

    space: Space
    matrix: Tensor
    rows: int
    precision: float
    kind: ClassVar[str] = "primal"
    negligible: ClassVar[int] = 0
    row_bytes: ClassVar[int] = 0
    _damping: float | None = None  # of the factor
    _lower: Tensor | None = None
    _condition: float = 1.0
    _spectrum: tuple[Tensor, Tensor] | None = None

    @property
    def size(self) -> int:
        """Return d."""
        return self.space.dim

    @property
    def trace(self) -> float:
        """Return the trace of H."""
        return float(self.matrix.diagonal().sum())

    @property
    def nbytes(self) -> int:
        """Return the bytes of the matrix and its factor."""
        return 16 * self.size**2

    def factorise(self, damping: float) -> None:
        """Hold a Cholesky factor of H + damping I.

        Raises:
            NumericsError: H + damping I is singular to the precision of the rows.
        """
        if self._damping == damping and self._lower is not None:
            return
        self._lower = None
        found = triangular(self.matrix, damping)
        least, greatest = (found.least, found.greatest) if found else (0.0, self.trace + damping)
        require_regular(least, greatest, self.precision, damping, squares=True)
        assert found is not None
        self._lower, self._damping, self._condition = found.lower, damping, greatest / least

    def rounding(self, damping: float) -> float:
        """Return a bound of the relative error of an answer from rounding of the rows."""
        if damping == 0:
            self.factorise(damping)
            return self.precision * self._condition
        return self.precision * (self._greatest + damping) / damping

    @cached_property
    def _greatest(self) -> float:
        return power_iteration(lambda v: self.matrix @ v, self.matrix) if self.trace > 0 else 0.0

    def invert(
        self, rows: Rows, names: Sequence[str], damping: float, *, spectral: bool
    ) -> dict[str, Block]:
        """Return the inverse times every row, formed; `Dual.invert` tells of the arguments."""
        del names  # all of them: blocks that are inverted together come together
        part = rows.select(self.space.names)
        flat = part.flat()
        vectors = flat.to(self.matrix.device, torch.float64)
        if spectral:
            shifted, basis = self._shifted(damping)
            solved = (vectors @ basis / shifted) @ basis.mT
        else:
            self.factorise(damping)
            assert self._lower is not None
            solved = solve_with(self._lower, vectors.mT).mT
        answer = Rows.from_flat(part.space, solved.to(flat), rows.index)
        return dict(answer.blocks)

    def invert_each(
        self, rows: Rows, names: Sequence[str], dampings: Sequence[float]
    ) -> list[dict[str, Block]]:
        """Return the same at several dampings: the rows are turned into the eigenvectors once."""
        del names
        part = rows.select(self.space.names)
        flat = part.flat()
        turned: Tensor | None = None
        found: list[dict[str, Block]] = []
        for damping in dampings:
            shifted, basis = self._shifted(damping)
            if turned is None:
                turned = flat.to(basis) @ basis  # [C, d]
            solved = (turned / shifted) @ basis.mT
            found.append(dict(Rows.from_flat(part.space, solved.to(flat), rows.index).blocks))
        return found

    def _shifted(self, damping: float) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of H + damping I and the eigenvectors, which are computed once."""
        if self._spectrum is None:
            self._spectrum = torch.linalg.eigh(self.matrix)
        values, basis = self._spectrum
        shifted = values.clamp_min(0) + damping  # a second moment: below zero is rounding
        if not float(shifted.min()) > 0:
            raise NumericsError(
                f"solver 'woodbury': H + damping I is singular (damping {damping:.3g}); give "
                "more damping"
            )
        return shifted, basis
