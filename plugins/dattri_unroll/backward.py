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
    TrainProblem,
)
from dattri_unroll.points import Points
from dattri_unroll.step_problem import StepProblem
from dattri_unroll.steps import Steps
from dattri_unroll.walk import Add

TINY = 1e-30
LOOKED = 4
"""Steps from one look at the lengths of rows to the next: it waits for the device."""
GROWTH = 5
"""By how much a row may grow on its way back before a warning is given."""


@frozen(eq=False)
class Backward:
    """psi_(s-1) = ((1 - eta_s weight_decay) I - eta_s H_s) psi_s, from the test rows at the end.

    Where groups of parameters have different learning rates eta is diagonal, and stands right of H.

    A step with momentum m and dampening d changes weights and velocity, and is carried back by the
    transpose of that change: with phi, less the derivative in the velocity, beside psi, that in the
    weights,

        t = eta psi + phi,  u = (1 - d) t,  psi' = psi - (H + weight_decay I) u,  phi' = m t,

    where u is what the batch's rows meet; Nesterov's has t = eta m psi + phi and u = (1 - d) t +
    eta psi. After the last step phi is zero, and at the first d is. Without momentum u = eta psi.

    Adam's steps carry two matrices beside psi, of his moments; see `AdamStep.through`. Of a clipped
    gradient u is taken through the derivative of the clipping, `Clipping.back`, before it meets
    rows and H. Decay that is decoupled takes eta weight_decay psi off psi in place of weight_decay
    u.

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
        turned: Named | None = None  # t of the step after, of Adam mu
        bent: Named | None = None  # nu
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
            if self.steps.taken(checkpoint).adam is None:
                direction, rate, turned = self.steps.through(problem, psi, turned, checkpoint)
            else:
                step = self.steps.adam_step(checkpoint)
                direction, turned, bent = step.through(problem.space, psi, turned, bent)
                rate = 1.0
            met = self.steps.before_clipping(problem, checkpoint, direction)
            blocks = {name: DenseBlock(values) for name, values in met.items()}
            taken = Rows(problem.space, blocks, index)
            seen = StepProblem(problem, batch, points.memory // 4)
            along = rate * self.steps.taken(checkpoint).scale
            scale = along * len(points.train) / len(batch)
            for part in seen.rows():
                epoch = self.steps.taken(checkpoint).epoch
                add(epoch, part.index, columns, part.inner(taken) * scale)
                advance(len(part))
            if checkpoint.position > 0:
                pull = self._pull(problem, checkpoint, psi, direction, rate)
                self._go_back(psi, taken, along, seen, pull)
                if checkpoint.position % LOOKED == 1:  # at the first step too
                    reached = lengths(psi)
                    _require_finite(reached, checkpoint)
                    growth = torch.maximum(growth, (reached / size.clamp_min(TINY)).max().cpu())
        if float(growth) > GROWTH:
            self._warn(float(growth))

    def _warn(self, growth: float) -> None:
        """Say that what is said of early steps may be of no use."""
        curvature = self.points.curvature
        if curvature is not None and "hessian-product" in curvature.needs:
            why = (
                "the run itself was unstable, so that the effect of an example that is left out "
                "may be another one than its derivative; train with a smaller learning rate, or of "
                "Adam with a larger eps"
            )
        else:
            why = (
                "the learning rate times an eigenvalue of the curvature is above 2 in some steps, "
                "where the run itself may have been stable; use the curvature 'ggn', or 'hessian', "
                "which is that of the run"
            )
        warnings.warn(
            f"dvemb: on the way back a test row grew to {growth:.3g} times its length at the end, "
            f"and so did what is said of early steps: {why}",
            RuntimeWarning,
            stacklevel=2,
        )

    def _pull(
        self,
        problem: TrainProblem,
        checkpoint: Checkpoint,
        psi: Named,
        direction: Named,
        rate: float,
    ) -> Named:
        """Return what weight decay takes off psi, in new tensors; nothing where there is none."""
        step = self.steps.taken(checkpoint)
        if not step.weight_decay:
            return {}
        if step.adam is not None and step.adam.decoupled:
            direction = self.steps.rated(problem, checkpoint, psi)
            rate = checkpoint.learning_rate or 0.0
        decay = self.steps.decay(problem, checkpoint)
        return {name: values * (decay[name] * rate) for name, values in direction.items()}

    def _go_back(
        self, psi: Named, taken: Rows, rate: float, seen: StepProblem, pull: Named
    ) -> None:
        """Write psi - H u - pull over psi, u being rate times what was taken."""
        operator = self.points.fit(seen)
        product = operator.apply(taken.to(dtype=operator.dtype))
        for name, values in psi.items():
            # What was taken may be psi, and the product what was taken.
            values.sub_(product.blocks[name].dense().values.to(values.dtype), alpha=rate)
            if pull:
                values.sub_(pull[name])


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
