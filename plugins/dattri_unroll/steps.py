"""The steps of a recorded run: what each saw, and whether they are those of gradient descent."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from attrs import frozen
from dattri_parts.solvers.rowwise import Named
from torch import Tensor

from dattri_core import Checkpoint, SpecError, TrainingStep, TrainProblem
from dattri_unroll.agreement import Previous, require_step
from dattri_unroll.points import Points

CHECKED = 8
"""Steps, evenly spaced, that are compared with what gradient descent would have done."""


@frozen(eq=False)
class Steps:
    """The steps taken from the checkpoints of a run.

    Args:
        points: Of the run.
        tolerance: Of `require_step`.

    Raises:
        SpecError: A step was not recorded, or saw an example that the train set does not have.
    """

    points: Points
    tolerance: float

    def __attrs_post_init__(self) -> None:
        n_train = len(self.points.train)
        for checkpoint in self.points.task.checkpoints:
            batch = self.taken(checkpoint).batch
            if batch is not None and len(batch) and int(batch.max()) >= n_train:
                raise SpecError(
                    f"{self.points.name}: the step at {checkpoint.name!r} saw the train example "
                    f"{int(batch.max())}, and the train set has {n_train}; give the train set that "
                    "the run was recorded with, in its order"
                )

    @property
    def work(self) -> int:
        """Return how many rows of train examples one pass scores."""
        return sum(len(self.batch(c)) for c in self.points.task.checkpoints)

    @property
    def epochs(self) -> list[int]:
        """Return the recorded epochs, in order."""
        steps = map(self.taken, self.points.task.checkpoints)
        return sorted({s.epoch for s in steps if s.batch is None or len(s.batch)})

    @property
    def checked(self) -> frozenset[int]:
        """Return the positions of the steps that are to be looked at."""
        last = max(0, len(self.points.task.checkpoints) - 2)
        return frozenset(np.linspace(0, last, CHECKED).astype(int).tolist())

    def taken(self, checkpoint: Checkpoint) -> TrainingStep:
        """Return the step that was taken from a checkpoint.

        Raises:
            SpecError: It was not recorded.
        """
        if checkpoint.step is None:
            raise SpecError(
                f"{self.points.name}: it is not known which step was taken from the checkpoint "
                f"{checkpoint.name!r}; record the training with dattri_unroll.record(model, "
                "optimizer, folder) and give Task(model, loss, "
                "checkpoints=dattri_unroll.read_run(folder))"
            )
        return checkpoint.step

    def batch(self, checkpoint: Checkpoint) -> Tensor:
        """Return the positions of the examples of a step, ``[B]``; none at the end of the run."""
        batch = self.taken(checkpoint).batch
        return torch.arange(len(self.points.train)) if batch is None else batch.cpu()

    def require(
        self, problem: TrainProblem, checkpoint: Checkpoint, after: Mapping[str, Tensor]
    ) -> None:
        """Raise `InputError` unless a step is the one that its batch and those before it give.

        Args:
            problem: At the checkpoint, not moved there.
            checkpoint: From which the step was taken.
            after: The attributed parameters after it.
        """
        points, before = self.points, None
        at = checkpoint.position
        if self.taken(checkpoint).momentum and at > 0:
            previous = points.task.checkpoints[at - 1]
            evaluator = points.problem(at - 1, along=True).evaluator
            before = Previous(evaluator, previous, self.batch(previous))
        require_step(
            points.name,
            problem.evaluator,
            after,
            checkpoint,
            self.batch(checkpoint),
            points.train,
            self.tolerance,
            problem.batch,
            before,
        )

    def through(
        self, rows: Named, turned: Named | None, checkpoint: Checkpoint
    ) -> tuple[Named, float, Named | None]:
        """Return what the gradients of a step meet, given what its weights and later ones meet.

        With momentum m and dampening d: t = eta rows + m t', t' that of the step after, and u = (1
        - d) t; Nesterov's has t = eta m rows + m t' and u = (1 - d) t + eta rows. At the first step
        d is zero. Without momentum u = eta rows.

        Args:
            rows: ``[C, ...]`` by block.
            turned: t', None at the last step; t is written over it.
            checkpoint: From which the step was taken.

        Returns:
            u as tensors and a factor, and t. Without momentum the tensors are the rows themselves;
            only Nesterov's are new ones.
        """
        step, rate = self.taken(checkpoint), checkpoint.learning_rate or 0.0
        if not step.momentum:
            return rows, rate, None
        share = rate * step.momentum if step.nesterov else rate
        if turned is None:
            turned = {name: values * share for name, values in rows.items()}
        else:
            for name, values in turned.items():
                values.mul_(step.momentum).add_(rows[name], alpha=share)
        kept = 1 - step.dampening if checkpoint.position else 1.0
        if not step.nesterov:
            return turned, kept, turned
        ahead = {n: torch.add(v * kept, rows[n], alpha=rate) for n, v in turned.items()}
        return ahead, 1.0, turned
