"""The pass backwards over the recorded steps: test rows carried from the end of the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from attrs import frozen
from dattri_parts.solvers.rowwise import Named, lengths
from torch import Tensor

from dattri_core import (
    Checkpoint,
    DenseBlock,
    NumericsError,
    Rows,
)
from dattri_unroll.points import Points
from dattri_unroll.step_problem import StepProblem
from dattri_unroll.steps import Steps
from dattri_unroll.walk import Add

TINY = 1e-30
GROWTH = 5
"""By how much a row may grow on its way back before a warning is given."""


@frozen(eq=False)
class Backward:
    """psi_(s-1) = ((1 - eta_s weight_decay) I - eta_s H_s) psi_s, from the test rows at the end.

    A step with momentum m and dampening d changes weights and velocity, and is carried back by the
    transpose of that change: with phi, less the derivative in the velocity, beside psi, that in the
    weights,

        t = eta psi + phi,  u = (1 - d) t,  psi' = psi - (H + weight_decay I) u,  phi' = m t,

    where u is what the batch's rows meet; Nesterov's has t = eta m psi + phi and u = (1 - d) t +
    eta psi. After the last step phi is zero, and at the first d is. Without momentum u = eta psi.

    Args:
        steps: Of the run.
    """

    steps: Steps

    @property
    def points(self) -> Points:
        """Return the points of the run."""
        return self.steps.points

    @property
    def work(self) -> int:
        """Return how many rows of train examples one pass scores."""
        return self.steps.work

    def run(self, columns: slice, add: Add, advance: Callable[[int], None]) -> None:
        """Go through all steps once, last step first, for some of the test examples.

        Args:
            columns: Which test examples.
            add: Takes the scores of each batch.
            advance: Called with the number of rows scored.

        Raises:
            InputError: A step is not that of gradient descent on its batch.
            NumericsError: The carried rows grow beyond all numbers.
        """
        points, checkpoints = self.points, self.points.task.checkpoints
        checked = self.steps.checked
        psi: Named | None = None  # written over step by step: nothing here is as large
        turned: Named | None = None  # t of the step after
        size = growth = torch.zeros(())  # of the rows at the end, and the most since then
        after: Mapping[str, Tensor] = {}
        index = torch.arange(columns.start, columns.stop)
        for checkpoint in reversed(checkpoints):
            at = checkpoint.position
            problem = points.problem(at, along=at not in checked)
            batch = self.steps.batch(checkpoint)
            if psi is None:
                ends = points.test_rows(problem, columns).blocks.items()
                psi = {name: block.dense().values.contiguous() for name, block in ends}
                size = lengths(psi)
            elif at in checked and columns.start == 0 and len(batch):
                self.steps.require(problem, checkpoint, after)
            after = problem.evaluator.selected
            if not len(batch):
                continue
            direction, rate, turned = self.steps.through(psi, turned, checkpoint)
            blocks = {name: DenseBlock(values) for name, values in direction.items()}
            taken = Rows(problem.space, blocks, index)
            seen = StepProblem(problem, batch, points.memory // 4)
            scale = rate * len(points.train) / len(batch)
            for part in seen.rows():
                epoch = self.steps.taken(checkpoint).epoch
                add(epoch, part.index, columns, part.inner(taken) * scale)
                advance(len(part))
            if checkpoint.position > 0:
                self._go_back(psi, taken, rate, seen, checkpoint)
                reached = lengths(psi)
                _require_finite(reached, checkpoint)
                growth = torch.maximum(growth, (reached / size.clamp_min(TINY)).max().cpu())
        if float(growth) > GROWTH:
            warnings.warn(
                f"dvemb: on the way back a test row grew to {float(growth):.3g} times its length "
                "at the end, and so did what is said of early steps: the learning rate times an "
                "eigenvalue of the curvature is above 2 in some steps, where the run itself may "
                "have been stable; use the curvature 'ggn', or 'hessian', which is that of the run",
                RuntimeWarning,
                stacklevel=2,
            )

    def _go_back(
        self, psi: Named, taken: Rows, rate: float, seen: StepProblem, checkpoint: Checkpoint
    ) -> None:
        """Write psi - (H + weight_decay I) u over psi, u being rate times what was taken."""
        operator = self.points.fit(seen)
        product = operator.apply(taken.to(dtype=operator.dtype))
        decay = self.steps.taken(checkpoint).weight_decay
        for name, values in psi.items():
            move = product.blocks[name].dense().values.to(values.dtype)
            if decay:  # in a new tensor: what was taken may be psi, and the product what was taken
                move = torch.add(move, taken.blocks[name].dense().values, alpha=decay)
            values.sub_(move, alpha=rate)


def _require_finite(reached: Tensor, checkpoint: Checkpoint) -> None:
    """Raise when a carried row is not finite, by its length."""
    if bool(torch.isfinite(reached).all()):
        return
    raise NumericsError(
        f"dvemb: the test rows carried back to {checkpoint.name!r} are not finite; the learning "
        "rate times an eigenvalue of the curvature is above 2 in many steps, where gradient "
        "descent on it diverges; use the curvature 'hessian', which is that of the run itself, or "
        "train with a smaller learning rate"
    )
