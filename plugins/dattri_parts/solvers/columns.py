"""The state of conjugate gradients on many systems: one column of numbers for each row solved."""

from __future__ import annotations

import torch
from attrs import define
from torch import Tensor

from dattri_core import DenseBlock, Inverse, NumericsError, Rows, Space
from dattri_parts.solvers.rowwise import column, dots, row_slices, squares, unit_rows


@define(eq=False)
class Columns:
    """Iterates x of all C systems; residuals r and directions p of those still at work.

    ``working`` systems are the first dimension of r and p; ``live`` says which ones they are.
    """

    space: Space
    solution: dict[str, Tensor]  # [C, *shape] by block
    residuals: dict[str, Tensor]  # [working, *shape]
    direction: dict[str, Tensor]  # [working, *shape]
    live: Tensor  # [working], positions among the C
    squared: Tensor  # [C], |r|^2 in float64
    target: float  # |r|^2 at which a system is solved
    length: Tensor  # [C], |g| in float64
    stopped: Tensor  # [C], met negative curvature
    reach: Tensor  # [C], largest |A p| / |p| so far: at most the norm of A = H + damping I
    slope: Tensor  # [C], <r, M r> in float64: |r|^2 without a preconditioner
    preconditioner: Inverse | None = None  # M

    @staticmethod
    def start(rows: Rows, tolerance: float, preconditioner: Inverse | None = None) -> Columns:
        """Return the state at x = 0 for right-hand sides g / |g|, in float32 or better."""
        units, length = unit_rows(rows, "cg")  # new tensors: the state changes in place
        columns = Columns(
            space=rows.space,
            solution={n: torch.zeros_like(v) for n, v in units.items()},
            residuals=units,
            direction={n: v.clone() for n, v in units.items()},
            live=torch.arange(len(rows), device=length.device),
            squared=(length > 0).to(torch.float64),
            target=tolerance**2,
            length=length,
            stopped=torch.zeros_like(length, dtype=torch.bool),
            reach=torch.zeros_like(length),
            slope=(length > 0).to(torch.float64),
            preconditioner=preconditioner,
        )
        columns._drop()
        columns._turn(first=True)
        return columns

    @property
    def working(self) -> int:
        """Return how many systems are still at work."""
        return len(self.live)

    @property
    def residual(self) -> float:
        """Return the largest relative residual |r| / |g|."""
        return float(self.squared.max().sqrt()) if len(self.squared) else 0.0

    @property
    def converged(self) -> int:
        """Return how many systems are solved."""
        return int(self._solved().sum())

    @property
    def negative(self) -> int:
        """Return how many systems stopped at negative curvature."""
        return int(self.stopped.sum())

    def directions(self, dtype: torch.dtype) -> Rows:
        """Return the directions p of the systems at work, as rows."""
        return self._rows(self.direction).to(dtype=dtype)

    def step(self, products: Rows, damping: float, *, first: bool) -> None:
        """Take one step, given H p; systems that are solved or stopped leave the work."""
        formed = {
            name: products.blocks[name].dense().values.to(self.direction[name].dtype)
            for name in self.space.names
        }
        for where in row_slices(self.direction):
            self._step_slice(where, {n: v[where] for n, v in formed.items()}, damping, first)
        self._drop()
        self._turn()

    def _step_slice(
        self, where: slice, product: dict[str, Tensor], damping: float, first: bool
    ) -> None:
        live = self.live[where]
        direction = {name: value[where] for name, value in self.direction.items()}
        residual = {name: value[where] for name, value in self.residuals.items()}
        length = squares(direction)
        bend = dots(direction, product)
        size = squares(product)
        if not bool(torch.isfinite(bend + size).all()):
            raise NumericsError(
                "solver 'cg': a curvature product is not finite; look for a diverged checkpoint"
            )
        curve = bend + damping * length  # p^T (H + damping I) p
        image = (size + 2 * damping * bend + damping**2 * length).clamp(min=0)  # |A p|^2
        self.reach[live] = torch.maximum(self.reach[live], (image / length).sqrt())
        precision = torch.finfo(next(iter(direction.values())).dtype).eps
        # Not positive, up to the rounding of a product with A.
        stop = curve <= precision * self.reach[live] * length
        rate = (self.slope[live] / curve.where(~stop, curve.new_ones(()))).where(~stop, 0.0)
        move = rate.where(~stop, 1.0 if first else 0.0)
        for name, value in direction.items():
            _add(self.solution[name], live, value, move)
            residual[name].addcmul_(product[name], column(-rate, value))
            residual[name].addcmul_(value, column(-damping * rate, value))
        squared = squares(residual)
        if self.preconditioner is None:
            turn = squared / self.slope[live]
            for name, value in direction.items():
                torch.addcmul(residual[name], value, column(turn, value), out=value)
            self.slope[live] = squared
        self.squared[live] = squared
        self.stopped[live] = stop

    def _turn(self, *, first: bool = False) -> None:
        """Replace p by M r + (<r, M r> / its last value) p, given a preconditioner M."""
        if self.preconditioner is None or not self.working:
            return
        found = self.preconditioner.apply(self._rows(self.residuals))
        moved = {n: found.blocks[n].dense().values.to(v.dtype) for n, v in self.residuals.items()}
        slope = dots(self.residuals, moved)
        if not bool((slope > 0).all()):
            raise NumericsError(
                f"solver 'cg': the preconditioner M is not positive definite: <r, M r> is "
                f"{float(slope.min()):.3g} for a residual r; give its solver more damping, or take "
                "a curvature without negative eigenvalues ('ggn') for it"
            )
        turn = slope * 0 if first else slope / self.slope[self.live]
        for name, value in self.direction.items():
            torch.addcmul(moved[name], value, column(turn, value), out=value)
        self.slope[self.live] = slope

    def _rows(self, values: dict[str, Tensor]) -> Rows:
        blocks = {name: DenseBlock(value) for name, value in values.items()}
        return Rows(self.space, blocks, self.live.cpu())

    def answer(self, rows: Rows) -> Rows:
        """Return the iterates as rows like those that were given."""
        blocks = {
            name: DenseBlock(value.mul_(column(self.length, value)).to(rows.dtype))
            for name, value in self.solution.items()
        }
        return Rows(rows.space, blocks, rows.index, rows.aux)

    def _solved(self) -> Tensor:
        return (self.squared <= self.target) & ~self.stopped

    def _drop(self) -> None:
        done = (self._solved() | self.stopped)[self.live]
        if not bool(done.any()):
            return
        keep = (~done).nonzero().squeeze(1)
        self.live = self.live[keep]
        for held in (self.residuals, self.direction):
            for name in held:
                held[name] = held[name][keep]


def _add(solution: Tensor, live: Tensor, direction: Tensor, rate: Tensor) -> None:
    """Add rate times direction to the solutions of the live systems."""
    step = column(rate, direction)
    first, last = int(live[0]), int(live[-1])
    if last - first + 1 == len(live):
        solution[first : last + 1].addcmul_(direction, step)
    else:
        solution.index_add_(0, live, direction * step)
