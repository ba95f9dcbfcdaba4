"""The operator of a curvature that is known by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core import (
    CurvatureKind,
    EachProblem,
    ModelProblem,
    NumericsError,
    Problem,
    RandomStream,
    Rows,
    Space,
    kept,
    summed,
)

SLICE_LIMIT = 8 * 2**20
"""Bytes of the unit vectors that one pass over the train set takes."""
TILE = 1024
"""Rows and columns that are symmetrised at once."""


@frozen(eq=False)
class ProductOperator:
    """H v by one pass over the train set for all vectors v that are given.

    Args:
        problem: The train set.
        kind: Which curvature.
    """

    problem: Problem
    kind: CurvatureKind

    @property
    def space(self) -> Space:
        """Return the space of the problem's rows."""
        return self.problem.space

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the rows."""
        return self.problem.dtype

    @property
    def memory(self) -> int:
        """Return the bytes that the fit may use."""
        return self.problem.memory

    @property
    def n_train(self) -> int:
        """Return the number of train examples."""
        return self.problem.n_train

    @property
    def random(self) -> RandomStream:
        """Return the stream of random numbers of the fit."""
        return self.problem.random

    def apply(self, rows: Rows) -> Rows:
        """Return H g for every row g."""
        return self.problem.product(rows, self.kind)

    def apply_on(self, rows: Rows, index: Tensor) -> Rows:
        """Return H g for every row g, H the mean over the examples at some positions."""
        return self.problem.product(rows, self.kind, index)

    def kept(
        self, name: str, part: Any, make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return what a solver computes of this operator, from disk where fits are kept."""
        return kept(self.problem, name, {"curvature": self.kind, "solver": part}, make)

    def apply_each(self, rows: Rows, index: Tensor) -> Rows:
        """Return H_i g of one row g for the examples at some positions, one row for each."""
        if isinstance(self.problem, EachProblem):
            return self.problem.product_each(rows, self.kind, index)
        found = [self.apply_on(rows, index[i : i + 1]) for i in range(len(index))]
        return evolve(Rows.concatenate(found), index=index)

    def dense(self) -> Tensor:
        """Return H in float64, ``[d, d]``: its products with the unit vectors, symmetrised.

        Raises:
            NumericsError: The products are not symmetric up to rounding.
        """
        live, part = self.live_dense()
        size = self.space.dim
        if len(live) == size:
            return part
        matrix = torch.zeros(size, size, dtype=part.dtype, device=part.device)
        matrix[live[:, None], live] = part
        return matrix

    def live_dense(self) -> tuple[Tensor, Tensor]:
        """Return the coordinates ``[k]`` whose row of H is not zero, and H among them, ``[k, k]``.

        Raises:
            NumericsError: The products are not symmetric up to rounding.
        """
        size, device = self.space.dim, self.problem.device
        item = torch.empty((), dtype=self.dtype).element_size()
        budget = max(1, min(SLICE_LIMIT, self.memory // 8))
        step = max(1, min(size, budget // (size * item)))
        live = self._live()
        idle = torch.ones(size, dtype=torch.bool, device=device)
        idle[live] = False
        matrix = torch.empty(len(live), len(live), dtype=torch.float64, device=device)
        stray = torch.zeros((), dtype=self.dtype, device=device)
        for first in range(0, len(live), step):
            chosen = live[first : first + step]
            units = torch.zeros(len(chosen), size, dtype=self.dtype, device=device)
            units[torch.arange(len(chosen), device=device), chosen] = 1
            rows = Rows.from_flat(self.space, units, torch.arange(len(chosen)))
            found = self._summed(rows)
            if len(live) < size:
                stray = torch.maximum(stray, found[:, idle].abs().max())
                found = found[:, live]
            matrix[first : first + step] = found
        symmetrise(matrix, self._rounding(tf32=True), f"curvature {self.kind!r}", float(stray))
        return live, matrix

    def precision(self) -> float:
        """Return the rounding of a product by the dtypes in which the model computes."""
        return self._rounding(tf32=False)

    def _rounding(self, *, tf32: bool) -> float:
        """Return the rounding of a product; a float64 model may normalise in float32."""
        own: float = torch.finfo(self.dtype).eps
        if not isinstance(self.problem, ModelProblem):
            return own
        return max(own, self.problem.epsilon(tf32=tf32))

    def _summed(self, rows: Rows) -> Tensor:
        """Return H g for rows that are the same in every process, flat."""

        def read(part: Problem) -> dict[str, Tensor]:
            return {"H g": part.product(rows, self.kind).flat()}

        return summed(self.problem, read)["H g"]

    def _live(self) -> Tensor:
        """Return the coordinates whose row of H is not zero.

        A row of zeros (a pixel that is always black, a word that never occurs, a dead unit) gives
        exactly zero with any vector, and no other row does with a random one, up to chance zero.
        """
        generator = self.problem.random.generator("live rows")
        probe = torch.randn(2, self.space.dim, generator=generator).to(
            device=self.problem.device, dtype=self.dtype
        )
        product = self._summed(Rows.from_flat(self.space, probe, torch.arange(2)))
        return torch.nonzero((product != 0).any(0))[:, 0]


def symmetrise(matrix: Tensor, precision: float, name: str, stray: float = 0.0) -> None:
    """Replace A by (A + A^T) / 2 in place, tile by tile.

    Args:
        matrix: ``[d, d]``.
        precision: Relative rounding of one entry.
        name: What the matrix is.
        stray: The largest entry of A whose mirror was left out, since it is zero.

    Raises:
        NumericsError: |A - A^T| is more than rounding of the largest entry explains.
    """
    size = len(matrix)
    if size == 0:
        return
    worst = torch.full((), stray, dtype=matrix.dtype, device=matrix.device)
    largest = torch.maximum(matrix.max(), -matrix.min())
    for top in range(0, size, TILE):
        rows = slice(top, top + TILE)
        for left in range(top, size, TILE):
            columns = slice(left, left + TILE)
            upper, lower = matrix[rows, columns], matrix[columns, rows].mT
            worst = torch.maximum(worst, (upper - lower).abs().max())
            mean = (upper + lower) / 2
            matrix[rows, columns] = mean
            matrix[columns, rows] = mean.mT
    if not float(worst) <= min(0.1, 1e4 * precision) * float(largest):
        raise NumericsError(
            f"{name}: its products with unit vectors are not symmetric: entries differ from their "
            f"mirror by up to {float(worst):.3g}, the largest entry is {float(largest):.3g}; "
            "something random or data dependent runs in the model, or an operation has a wrong "
            "second derivative; try model.double()"
        )
