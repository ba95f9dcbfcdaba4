"""The steps of a recorded run: what each saw, and whether they are those of its optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import torch
from attrs import field, frozen
from dattri_parts.solvers.rowwise import Named
from torch import Tensor

from dattri_core import Checkpoint, SpecError, TrainingStep, TrainProblem
from dattri_unroll.adam_steps import AdamStep, Moments, require_adam_step, rows_of
from dattri_unroll.agreement import Previous, descent_of, require_step, slope_of
from dattri_unroll.clipping import Clipping
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
        SpecError: A step was not recorded, or saw an example that the train set does not have; or
            was one of Adam and his moments are not known, or clipped and not all parameters are
            attributed.
    """

    points: Points
    tolerance: float
    _read: dict[int, Moments] = field(factory=dict, init=False)

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
        self._require_moments()
        self._require_all_parameters()
        self._require_entries()

    def _require_moments(self) -> None:
        """Raise `SpecError` where a step of Adam is not known whole."""
        checkpoints = self.points.task.checkpoints
        taken = [c for c in checkpoints if len(self.batch(c))]
        if len({self.taken(c).adam is None for c in taken}) > 1:
            raise SpecError(
                f"{self.points.name}: some steps of the run are those of Adam and some of gradient "
                "descent, and what one hands on the other does not read; give a run of one "
                "optimiser, or the part of it that was"
            )
        for checkpoint, after in pairwise(checkpoints):
            if self.taken(checkpoint).adam is not None and after.optimiser is None:
                raise SpecError(
                    f"{self.points.name}: the step at {checkpoint.name!r} is one of Adam, and the "
                    f"moments after it, of {after.name!r}, are not known; give "
                    "Task(..., optimisers=[...]), or record the run with dattri_unroll.record"
                )
        if self.taken(checkpoints[-1]).adam is not None and len(self.batch(checkpoints[-1])):
            raise SpecError(
                f"{self.points.name}: the last checkpoint, {checkpoints[-1].name!r}, has a step of "
                "Adam, and the moments after it are not known; give the whole run, "
                "dattri_unroll.read_run(folder)"
            )

    def _require_all_parameters(self) -> None:
        """Raise `SpecError` where a gradient was clipped of which a part alone is known."""
        task = self.points.task
        if all(self.taken(c).clip is None for c in task.checkpoints):
            return
        trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
        left = sorted(trained - set(task.parameter_names))
        if left:
            raise SpecError(
                f"{self.points.name}: gradients were clipped to the norm of all parameters, and "
                f"{left[:6]} are not attributed; give all that were trained, parameters='*'"
            )

    def _require_entries(self) -> None:
        """Raise `SpecError` where steps are made of single parameters, and rows are a sketch."""
        steps = map(self.taken, self.points.task.checkpoints)
        if not any(not s.linear or s.rates or isinstance(s.weight_decay, Mapping) for s in steps):
            return
        space = self.points.problem(-1).space
        if not space.covers_parameters:
            raise SpecError(
                f"{self.points.name}: steps of Adam, clipped gradients and groups with different "
                "learning rates or weight decays are made entry by entry, and the rows have "
                f"{space.dim} entries that are no parameters; use no projector, "
                "projector='identity'"
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
        if self.taken(checkpoint).adam is not None:
            evaluator, batch = problem.evaluator, self.batch(checkpoint)
            require_adam_step(
                points.name,
                self.adam_step(checkpoint),
                self._moments(at),
                descent_of(evaluator, checkpoint, batch, points.train, problem.batch),
                (evaluator.selected, after),
                checkpoint,
                self.tolerance,
            )
            return
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

    def adam_step(self, checkpoint: Checkpoint) -> AdamStep:
        """Return a step of Adam, from the moments before and after it.

        Raises:
            InputError: A parameter took no part in it.
        """
        at, device = checkpoint.position, self.points.task.device
        before, after = self._moments(at), self._moments(at + 1)
        return AdamStep.of(self.points.name, checkpoint, before, after, device)

    def _moments(self, position: int) -> Moments:
        """Return Adam's moments at a checkpoint; the last two that were read are kept."""
        if position not in self._read:
            task, names = self.points.task, self.points.task.parameter_names
            state = task.checkpoints[position].optimiser
            for old in [known for known in self._read if abs(known - position) > 1]:
                del self._read[old]
            found = {} if state is None else state.load(task.model, names)
            self._read[position] = {name: found[name] for name in names if name in found}
        return self._read[position]

    def before_clipping(self, problem: TrainProblem, checkpoint: Checkpoint, rows: Named) -> Named:
        """Return what the gradients of a step meet, given what the clipped one meets.

        Args:
            problem: At the checkpoint.
            checkpoint: Of the step.
            rows: ``[C, ...]`` by block; only read.

        Returns:
            New tensors, or the rows themselves where nothing was clipped.
        """
        step, batch = self.taken(checkpoint), self.batch(checkpoint)
        if step.clip is None:
            return rows
        gradient = slope_of(problem.evaluator, step, batch, self.points.train, problem.batch)
        clipping = Clipping.of(gradient, step.clip)
        like = next(iter(rows.values()))
        return clipping.back(rows, rows_of(problem.space, gradient, like))

    def decay(self, problem: TrainProblem, checkpoint: Checkpoint) -> dict[str, float | Tensor]:
        """Return the weight decay of each block, a number or one for each of its entries."""
        step = self.taken(checkpoint)
        if not isinstance(step.weight_decay, Mapping):
            return {spec.name: step.weight_decay for spec in problem.space}
        return dict(_by_entry(problem, step.decay_of))

    def rated(self, problem: TrainProblem, checkpoint: Checkpoint, rows: Named) -> Named:
        """Return rows times the learning rates of their entries over that of the step.

        Returns:
            New tensors, or the rows themselves where all have one rate.
        """
        step = self.taken(checkpoint)
        if not step.rates:
            return rows
        rates = _by_entry(problem, step.rate_of)
        return {name: values * rates[name] for name, values in rows.items()}

    def through(
        self, problem: TrainProblem, rows: Named, turned: Named | None, checkpoint: Checkpoint
    ) -> tuple[Named, float, Named | None]:
        """Return what the gradients of a step meet, given what its weights and later ones meet.

        With momentum m and dampening d: t = eta rows + m t', t' that of the step after, and u = (1
        - d) t; Nesterov's has t = eta m rows + m t' and u = (1 - d) t + eta rows. At the first step
        d is zero. Without momentum u = eta rows.

        Args:
            problem: At the checkpoint.
            rows: ``[C, ...]`` by block.
            turned: t', None at the last step; t is written over it.
            checkpoint: From which the step was taken.

        Returns:
            u as tensors and a factor, and t. Without momentum the tensors are the rows themselves;
            only Nesterov's are new ones.
        """
        step, rate = self.taken(checkpoint), checkpoint.learning_rate or 0.0
        rows = self.rated(problem, checkpoint, rows)
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


def _by_entry(problem: TrainProblem, number: Callable[[str], float]) -> Named:
    """Return a number of each parameter at all of its entries, one row ``[1, ...]`` by block."""
    chosen = problem.evaluator.selected
    each = {name: torch.full_like(t, number(name)) for name, t in chosen.items()}
    return rows_of(problem.space, each, next(iter(chosen.values())))
