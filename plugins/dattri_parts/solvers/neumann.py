"""The Neumann series of an inverse, summed for many rows at once."""

from __future__ import annotations

from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor

from dattri_core import DenseBlock, Inverse, NumericsError, Rows
from dattri_parts.solvers.factor import precision_of
from dattri_parts.solvers.rowwise import (
    Named,
    column,
    dots,
    lengths,
    row_slices,
    squares,
    unit_rows,
)

CHECK = 10
"""Steps on samples between two looks at the lengths: each waits for the device."""
DOUBLINGS = 6
"""Of an estimated scale, for rows that diverge at it on samples."""
PROBED = 4
"""Samples on which the curvature along a row that diverged is measured."""
ROUNDED = 4.0
"""Roots of a rounding, in the length of g, below which a step may be rounding that M stretches."""


@define(eq=False)
class NeumannSeries:
    """v <- g + (I - (H + damping I) M / s) v at one operator, damping and scale.

    M is the identity without a preconditioner, and M v / s the answer. Lengths are those of M:
    |v|^2 = <v, M v>, in which a step is symmetric. A row that diverges on samples is summed again
    at twice the scale where that is allowed, and the others go on without it: what is done with a
    row depends on the row and the draws alone.

    Args:
        operator: H.
        device: Where rows are.
        depth: Steps of a run.
        repeats: Runs whose mean is taken.
        batch: Train examples of a step; None for the whole train set.
        damping: Absolute.
        scale: s.
        widens: Whether a row that diverges on samples is summed again at twice the scale.
        preconditioner: M, positive definite; None for the identity.
    """

    operator: Any
    device: torch.device
    depth: int
    repeats: int
    batch: int | None
    damping: float
    scale: float
    widens: bool = False
    preconditioner: Inverse | None = None
    iterations: int = field(default=0, init=False)
    change: float = field(default=0.0, init=False)  # |v_t+1 - v_t| / |v_t|, largest of all rows
    residual: float | None = field(default=None, init=False)  # |g - A x| / |g|, on all data only
    widest: float = field(default=0.0, init=False)  # the largest scale that a row was summed at
    widened: int = field(default=0, init=False)  # rows that were summed at a larger scale

    @property
    def stats(self) -> dict[str, float]:
        """Return what was reached, of all rows since the series was made."""
        found = {
            "damping": self.damping,
            "scale": self.scale,
            "iterations": float(self.iterations),
            "change": self.change,
        }
        if self.residual is not None:
            found["residual"] = self.residual
        if self.widened:
            found |= {"widest_scale": self.widest, "widened": float(self.widened)}
        return found

    def sum(self, rows: Rows) -> Rows:
        """Return the mean over repeats of the series, divided by its scale.

        Raises:
            NumericsError: A row is not finite, or the series of one diverges.
        """
        unit, length = unit_rows(rows, "lissa")
        total, scale = self._widening(unit, rows.index)
        factor = length / (self.repeats * scale)
        blocks = {
            name: DenseBlock(value.mul_(column(factor, value)).to(rows.dtype))
            for name, value in total.items()
        }
        return Rows(rows.space, blocks, rows.index, rows.aux)

    def product(self, vectors: Rows, repeat: int, step: int) -> Rows:
        """Return H times rows, H of the sample of one step or of the train set."""
        operator, batch = self.operator, self.batch
        given = vectors.to(dtype=operator.dtype)
        answer: Rows
        if batch is None:
            answer = operator.apply(given)
        else:
            generator = operator.random.generator("lissa", repeat, step)
            index = torch.randint(operator.n_train, (batch,), generator=generator)
            answer = operator.apply_on(given, index)
        return answer

    def _widening(self, unit: Named, index: Tensor) -> tuple[Named, Tensor]:
        """Return the sum over repeats of every row, and the scale of each: ``[C]``."""
        scale = self.scale
        total, kept = self._repeats(unit, index, scale)
        scales = torch.full((len(index),), scale, dtype=torch.float64, device=self.device)
        if len(kept) == len(index):
            return total, scales
        whole = {name: torch.zeros_like(value) for name, value in unit.items()}
        left = torch.arange(len(index), device=self.device)
        while True:
            at = left[kept]
            for name, value in total.items():
                whole[name][at] = value
            scales[at] = scale
            left = left[_others(len(left), kept)]
            if not len(left):
                break
            scale *= 2
            self.widest = max(self.widest, scale)
            total, kept = self._repeats(_some(unit, left), index[left.cpu()], scale)
        self.widened += int((scales > self.scale).sum())
        return whole, scales

    def _repeats(self, unit: Named, index: Tensor, scale: float) -> tuple[Named, Tensor]:
        """Return the sum over repeats of the rows that stay bounded, and which they are."""
        total, kept = self._run(unit, index, scale, 0)
        for repeat in range(1, self.repeats):
            found, still = self._run(_some(unit, kept), index[kept.cpu()], scale, repeat)
            total = _some(total, still)
            for name, value in found.items():
                total[name] += value
            kept = kept[still]
        return total, kept

    def _run(self, start: Named, index: Tensor, scale: float, repeat: int) -> tuple[Named, Tensor]:
        """Return M v after the last step, from v = g, for rows g of length 1 or 0 that keep it."""
        depth, whole = self.depth, self.batch is None
        dtypes = [*(value.dtype for value in start.values()), self.operator.dtype]
        precision = max(torch.finfo(dtype).eps for dtype in dtypes)
        coarse = max(precision, precision_of(self.operator))  # of a model in mixed precision
        kept = torch.arange(len(index), device=self.device)
        current = {name: value.clone() for name, value in start.items()}
        turned = self._turned(current)  # M v
        unit = self._lengths(current, turned)
        floor = 0.0 if self.preconditioner is None else ROUNDED * precision**0.5
        before = torch.full_like(unit, float("inf"))
        ended = torch.zeros_like(unit, dtype=torch.bool)  # a step is rounding
        for step in range(depth):
            last = step + 1 == depth
            looked = whole or last or step % CHECK == 0
            vectors = self._rows(turned, index[kept.cpu()])
            # The product is not named, so that it is freed before the next one is made.
            product = self.product(vectors, repeat, step)
            moves = self._advance(current, start, turned, product, scale, looked=looked)
            del product, vectors
            following = self._turned(current)
            if moves is None:
                turned = following
                continue
            moved, left = self._moved(moves, turned, following)
            turned = following
            reached = self._lengths(current, turned)
            if whole:
                most = torch.maximum(before + 64 * coarse * reached, floor * unit)
                self._require_shrinking(moved, most, step, scale)
                ended |= moved <= 4 * precision * reached
                ended |= (moved <= floor * unit) & (moved >= before)
                before = moved
            else:
                # g and what t steps add to it is no longer than t + 2 times g if none expands.
                bounded = reached <= 1.001 * (step + 2) * unit
                if not bool(bounded.all()):
                    rows = self._rows(turned, index[kept.cpu()])
                    self._require_widening(rows, ~bounded, scale, repeat, step)
                    kept, moved, left = kept[bounded], moved[bounded], left[bounded]
                    reached, unit = reached[bounded], unit[bounded]
                    still = torch.nonzero(bounded)[:, 0]
                    current, start = _some(current, still), _some(start, still)
                    turned = current if self.preconditioner is None else _some(turned, still)
                    if not len(kept):
                        return turned, kept
            if last or (whole and bool(ended.all())):
                self._report(step + 1, moved, reached, left)
                break
        return turned, kept

    def _advance(
        self,
        current: Named,
        start: Named,
        turned: Named,
        products: Rows,
        scale: float,
        *,
        looked: bool,
    ) -> _Moves | None:
        """Add g - (H + damping I) M v / s to v, and return what was added where that is asked."""
        squared = torch.zeros(len(products), dtype=torch.float64, device=self.device)
        whole = looked and self.preconditioner is not None
        every = {n: torch.empty_like(v) for n, v in current.items()} if whole else None
        found = {name: products.blocks[name].dense().values for name in current}
        for where in row_slices(current):
            moves = {}
            for name, value in current.items():
                part = found[name][where].to(value.dtype)
                move = torch.add(part, turned[name][where], alpha=self.damping)
                moves[name] = move.div_(-scale).add_(start[name][where])
                value[where] += move
                if every is not None:
                    every[name][where] = move
            if looked:
                squared[where] = squares(moves)
        return _Moves(squared.sqrt(), every) if looked else None

    def _turned(self, values: Named) -> Named:
        """Return M v; the values themselves without a preconditioner."""
        if self.preconditioner is None:
            return values
        count = len(next(iter(values.values())))
        found = self.preconditioner.apply(self._rows(values, torch.arange(count)))
        turned = {}
        for name, value in values.items():
            given = found.blocks[name].dense().values.to(value.dtype)
            same = given.data_ptr() == value.data_ptr()  # of an identity; v is written to later
            turned[name] = given.clone() if same else given
        return turned

    def _lengths(self, values: Named, turned: Named) -> Tensor:
        """Return |v| in the inner product of M, given M v: ``[C]``."""
        if self.preconditioner is None:
            return lengths(values)
        squared = dots(values, turned)
        if not bool((squared >= 0).all()):
            raise NumericsError(
                "solver 'lissa': the preconditioner M is not positive definite: <v, M v> is "
                f"{float(squared.min()):.3g} for a sum v; give its solver more damping, or take a "
                "curvature without negative eigenvalues ('ggn') for it"
            )
        return squared.sqrt()

    def _moved(self, moves: _Moves, before: Named, after: Named) -> tuple[Tensor, Tensor]:
        """Return the lengths of what was added to v, in M and as they are, given M v around it."""
        if moves.values is None:
            return moves.lengths, moves.lengths
        turned = {name: value - before[name] for name, value in after.items()}
        return dots(moves.values, turned).clamp_min(0).sqrt(), moves.lengths

    def _require_shrinking(self, moved: Tensor, most: Tensor, step: int, scale: float) -> None:
        """Raise when a step is longer than the one before.

        |(I - A)^t g|^2 is a sum of positive geometric sequences, so log-convex in t: once it grows
        it grows for ever.
        """
        if bool((moved <= most).all()):
            return
        raise NumericsError(
            f"solver 'lissa': diverges from step {step + 1} on with damping {self.damping:.3g} and "
            f"scale {scale:.3g}: H + damping I has an eigenvalue that is negative, or above "
            f"twice the scale; give more damping, the curvature 'ggn', or a larger scale"
        )

    def _require_widening(
        self, vectors: Rows, diverged: Tensor, scale: float, repeat: int, step: int
    ) -> None:
        """Raise unless a larger scale may cure the rows that diverged.

        It does not where the curvature along them is negative: their direction grows at any scale.
        """
        allowed = self.widens and scale < self.scale * 2**DOUBLINGS
        if allowed:
            rows = vectors.take(torch.nonzero(diverged)[:, 0])
            along = sum(
                self.product(rows, 0, probe).pair_inner(rows).double() for probe in range(PROBED)
            )
            squared = rows.pair_inner(rows).double()
            if bool((along / PROBED + self.damping * squared > 0).all()):
                return
        raise NumericsError(
            f"solver 'lissa': diverged by step {step + 1} of repeat {repeat + 1} with damping "
            f"{self.damping:.3g} and scale {scale:.3g}: some samples of {self.batch} "
            "examples have an eigenvalue of H + damping I that is negative, or above twice the "
            "scale; give more damping, the curvature 'ggn', a larger scale or a larger batch"
        )

    def _rows(self, values: Named, index: Tensor) -> Rows:
        blocks = {name: DenseBlock(value) for name, value in values.items()}
        return Rows(self.operator.space, blocks, index)

    def _report(self, steps: int, moved: Tensor, reached: Tensor, left: Tensor) -> None:
        self.iterations = max(self.iterations, steps)
        change = (moved / reached)[reached > 0]
        self.change = max([self.change, *change.tolist()])
        if self.batch is None:
            self.residual = max([self.residual or 0.0, *left.tolist()])


@frozen(eq=False)
class _Moves:
    """What one step added to the sums: the length of each row, and in a space of M all of it."""

    lengths: Tensor  # [C]
    values: Named | None


def _some(values: Named, which: Tensor) -> Named:
    """Return rows by position, in order; the same where all are asked for."""
    first = next(iter(values.values()))
    if len(which) == len(first):
        return dict(values)
    return {name: value[which] for name, value in values.items()}


def _others(count: int, kept: Tensor) -> Tensor:
    """Return which of ``count`` rows are not kept."""
    mask = torch.ones(count, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask
