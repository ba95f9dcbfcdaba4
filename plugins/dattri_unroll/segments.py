"""The pass backwards over segments of a run in which curvature and gradients hardly change."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from dattri_core import (
    Checkpoint,
    DenseBlock,
    NumericsError,
    Rows,
    SpecError,
    SpectralOperator,
)
from dattri_unroll.points import Points
from dattri_unroll.segment_problem import SegmentProblem
from dattri_unroll.walk import Add


@frozen
class Segment:
    """Some checkpoints of a run, and how far gradient descent goes in their part of it.

    Args:
        checkpoints: In order.
        time: t, the sum of the learning rates of its steps.
        decay: The sum over its steps of learning rate times weight decay.
    """

    checkpoints: tuple[Checkpoint, ...]
    time: float
    decay: float


@frozen(eq=False)
class Segments:
    """psi_(l-1) = exp(-t_l (H_l + weight_decay I)) psi_l, from the test rows at the end.

    Args:
        points: Of the run.
        count: Of segments.
        iterations: Steps of the whole run; None: one for each checkpoint.
        weight_decay: Of the run; None: as recorded, else 0.
    """

    points: Points
    count: int
    iterations: int | None
    weight_decay: float | None

    def __attrs_post_init__(self) -> None:
        self.segments()

    @property
    def work(self) -> int:
        """Return how many rows of train examples one pass scores."""
        return len(self.points.train) * len(self._standing())

    def segments(self) -> list[Segment]:
        """Return the segments of the run in order, of as equal numbers of checkpoints as can be.

        Raises:
            SpecError: There are fewer checkpoints than segments, or rates or steps are not known.
        """
        standing = self._standing()
        if len(standing) < self.count:
            raise SpecError(
                f"source: {self.count} segments need as many checkpoints at least, and the task "
                f"has {len(standing)}; give more, or a smaller segments="
            )
        if self.iterations is None and any(c.step is None for c in standing):
            raise SpecError(
                "source: it is not known how many steps the run took; give iterations=, of which "
                "every checkpoint stands for an equal share, or a recorded run, "
                "dattri_unroll.read_run(folder)"
            )
        share = 1.0 if self.iterations is None else self.iterations / len(standing)
        bent = [c.name for c in standing if c.step and (c.step.rates or not c.step.linear)]
        if bent:
            raise SpecError(
                f"source: the step at {bent[0]!r} is one of Adam, of a clipped gradient or of "
                "different learning rates, and segments are of gradient descent at one; use "
                "'magic', which follows those too, or take the run as one of SGD at one rate by "
                "giving its weights alone, Task(..., checkpoints=[paths], learning_rates=[...]) "
                "and iterations="
            )
        made = []
        for places in np.array_split(np.arange(len(standing)), self.count):
            chosen = tuple(standing[at] for at in places)
            rates = [_rate(checkpoint) * share for checkpoint in chosen]
            decays = [rate * self._decay(c) for rate, c in zip(rates, chosen, strict=True)]
            along = [
                rate * (1.0 if c.step is None else c.step.scale)
                for rate, c in zip(rates, chosen, strict=True)
            ]
            made.append(Segment(chosen, sum(along), sum(decays)))
        return made

    def run(self, columns: slice, add: Add, advance: Callable[[int], None]) -> None:
        """Go through all segments once, the last first, for some of the test examples.

        Args:
            columns: Which test examples.
            add: Takes the scores of each batch.
            advance: Called with the number of rows scored.

        Raises:
            NumericsError: An eigenvalue far below zero makes a row grow beyond all numbers.
        """
        points = self.points
        carried = points.test_rows(points.problem(-1), columns)
        for segment in reversed(self.segments()):
            places = [checkpoint.position for checkpoint in segment.checkpoints]
            problem = SegmentProblem(
                points.problem(places[0]),
                len(places),
                lambda at, places=places: points.problem(places[at]),  # type: ignore[misc]
            )
            operator = points.fit(problem)
            assert isinstance(operator, SpectralOperator)
            gathered, carried = through(operator, segment, carried)
            for part in problem.rows():
                index = part.index % len(points.train)
                add(0, index, columns, part.inner(gathered) / len(places))
                advance(len(part))

    def _standing(self) -> list[Checkpoint]:
        """Return the checkpoints that stand for steps: all but the end of a recorded run."""
        ends = [
            c.step is not None and c.step.batch is not None and len(c.step.batch) == 0
            for c in self.points.task.checkpoints
        ]
        return [c for c, end in zip(self.points.task.checkpoints, ends, strict=True) if not end]

    def _decay(self, checkpoint: Checkpoint) -> float:
        if self.weight_decay is not None:
            return self.weight_decay
        decay = 0.0 if checkpoint.step is None else checkpoint.step.weight_decay
        if isinstance(decay, Mapping):
            raise SpecError(
                f"source: parameters have different weight decays, {sorted(set(decay.values()))}, "
                "and a segment has one; give weight_decay="
            )
        return decay


def through(operator: SpectralOperator, segment: Segment, carried: Rows) -> tuple[Rows, Rows]:
    """Return what a segment's gradients meet, and the test rows before it.

    With A = H + weight_decay I: (I - exp(-t A)) A^-1 psi, which is t psi where A is zero, and
    exp(-t A) psi.

    Raises:
        NumericsError: They are not finite.
    """
    inside = operator.basis.map(carried)
    space = operator.basis.out_space
    exponents = {
        name: segment.time * values.double() + segment.decay
        for name, values in operator.eigenvalues.items()
    }
    none = torch.full((), segment.decay, dtype=torch.float64)
    found = []
    functions: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: segment.time * _mean_decline(x),
        lambda x: torch.exp(-x),
    )
    for function in functions:
        outside = 0.0 if operator.complete else float(function(none))
        weights = {name: function(x) - outside for name, x in exponents.items()}
        weighted = _weighted(inside, weights)
        back = operator.basis.adjoint(Rows(space, weighted, carried.index)).flat()
        flat = (carried.flat() * outside + back.to(carried.dtype)).contiguous()
        if not bool(torch.isfinite(flat).all()):
            raise NumericsError(
                f"source: the test rows carried back over {segment.checkpoints[0].name!r} are not "
                "finite; its curvature has eigenvalues far below zero; use one that has none, such "
                "as 'ekfac'"
            )
        found.append(Rows.from_flat(carried.space, flat, carried.index))
    return found[0], found[1]


def _weighted(rows: Rows, weights: Mapping[str, Tensor]) -> dict[str, DenseBlock]:
    blocks = {}
    for name, block in rows.blocks.items():
        values = block.dense().values
        blocks[name] = DenseBlock(values * weights[name].to(values).reshape(values.shape[1:]))
    return blocks


def _mean_decline(x: Tensor) -> Tensor:
    """Return (1 - exp(-x)) / x, 1 at zero."""
    safe = torch.where(x == 0, 1.0, x)
    return torch.where(x == 0, 1.0, -torch.expm1(-safe) / safe)


def _rate(checkpoint: Checkpoint) -> float:
    """Return how far a step goes along a gradient that stays: with recorded momentum m further.

    v = m v + (1 - dampening) g tends to (1 - dampening) / (1 - m) g.
    """
    if checkpoint.learning_rate is None:
        raise SpecError(
            f"source: the checkpoint {checkpoint.name!r} has no learning rate; give "
            "Task(..., checkpoints=[...], learning_rates=[...])"
        )
    step, rate = checkpoint.step, checkpoint.learning_rate
    if step is None or not step.momentum:
        return rate
    return rate * (1 - step.dampening) / (1 - step.momentum)
