"""The pass over the recorded steps that shares each step's change of the target out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from attrs import evolve, field, frozen
from dattri_parts.solvers.rowwise import Named
from torch import Tensor

from dattri_core import (
    Checkpoint,
    DenseBlock,
    EachOperator,
    Loss,
    Rows,
    SpecError,
    TrainProblem,
    from_parameters,
)
from dattri_unroll.agreement import descent_of
from dattri_unroll.points import Points
from dattri_unroll.step_problem import StepProblem
from dattri_unroll.steps import Steps
from dattri_unroll.walk import Add

PRODUCTS = frozenset({"hessian-product", "ggn-product"})
"""What a curvature may need: outer products of one gradient have no sign, as a target does."""


@frozen(eq=False)
class InRun:
    """c_s = h_s - H_s (theta_s - theta_(s+1)) / 2, and what a batch's gradients meet of it.

    The last step comes first, since a step with momentum goes on in later ones: a gradient at step
    s has the weight w_st in step t, so that it meets sum_(t >= s) w_st c_t; see `Steps.through`.

    Args:
        steps: Of the run. Its points have the curvature of the target, or none for the first order.

    Raises:
        SpecError: The curvature cannot be that of the target, or a step is none of gradient
            descent.
    """

    steps: Steps
    _queries: Points | None = field(init=False)  # the test set as a curvature of it is fitted on

    def __attrs_post_init__(self) -> None:
        points, queries = self.points, None
        bent = [c.name for c in points.task.checkpoints if c.step and not c.step.linear]
        if bent:
            raise SpecError(
                f"{points.name}: the step at {bent[0]!r} is one of Adam or of a clipped gradient, "
                "and no sum of the gradients of its batch, which alone can be shared out; use "
                "'magic', or train with SGD without clipping"
            )
        curvature, target = points.curvature, points.task.target
        if curvature is not None and not curvature.needs <= PRODUCTS:
            raise SpecError(
                f"{points.name}: the curvature is that of the target of one test example, and "
                f"{type(curvature).__name__} is made of gradients of the loss; use 'hessian' or "
                "'ggn', or none for the first order"
            )
        if curvature is not None and target is not None:
            if "ggn-product" in curvature.needs and not isinstance(target.function, Loss):
                raise SpecError(
                    f"{points.name}: the curvature {type(curvature).__name__} is to be that of the "
                    f"target {target.name!r}, whose outputs and criterion are not known apart; use "
                    "'hessian', or dattri.Target(dattri.Loss(forward=..., criterion=...), "
                    "higher_is_better=...)"
                )
            task = points.task.with_(loss=target.function, target=None)
            queries = evolve(points, task=task, train=points.test)
        object.__setattr__(self, "_queries", queries)

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
        """
        points, checked = self.points, self.steps.checked
        after: Mapping[str, Tensor] = {}
        turned: Named | None = None
        index = torch.arange(columns.start, columns.stop)
        for checkpoint in reversed(points.task.checkpoints):
            at = checkpoint.position
            problem = points.problem(at, along=at not in checked)
            batch = self.steps.batch(checkpoint)
            if len(batch):
                if at in checked and columns.start == 0 and after:
                    self.steps.require(problem, checkpoint, after)
                met = self._met(problem, checkpoint, after, columns)
                direction, rate, turned = self.steps.through(problem, met, turned, checkpoint)
                blocks = {name: DenseBlock(values) for name, values in direction.items()}
                taken, epoch = (
                    Rows(problem.space, blocks, index),
                    self.steps.taken(checkpoint).epoch,
                )
                scale = rate * self.steps.taken(checkpoint).scale / len(batch)
                for part in problem.rows(batch):
                    add(epoch, part.index, columns, part.inner(taken) * scale)
                    advance(len(part))
            after = problem.evaluator.selected

    def _met(
        self,
        problem: TrainProblem,
        checkpoint: Checkpoint,
        after: Mapping[str, Tensor],
        columns: slice,
    ) -> Named:
        """Return c of a step for some test examples, ``[C, ...]`` by block."""
        points = self.points
        rows = points.test_rows(problem, columns)
        met = {name: block.dense().values.contiguous() for name, block in rows.blocks.items()}
        if points.curvature is None:
            return met
        move = self._move(problem, checkpoint, after)
        queries = self._at(checkpoint, problem)
        index = torch.arange(columns.start, columns.stop)
        for name, block in self._bent(queries, move, index).blocks.items():
            bent = block.dense().values.to(met[name])
            met[name].sub_(bent, alpha=points.task.sign / 2)
        return met

    def _bent(self, queries: TrainProblem, move: Rows, index: Tensor) -> Rows:
        """Return H_j delta for the test examples at some positions."""
        operator = self.points.fit(queries)
        if isinstance(operator, EachOperator):
            return operator.apply_each(move.to(dtype=operator.dtype), index)
        found = []
        for column in index:
            operator = self.points.fit(StepProblem(queries, column.unsqueeze(0), 0))
            found.append(operator.apply(move.to(dtype=operator.dtype)))
        return Rows.concatenate(found)

    def _move(
        self, problem: TrainProblem, checkpoint: Checkpoint, after: Mapping[str, Tensor]
    ) -> Rows:
        """Return theta_s - theta_(s+1) as a row of the problem."""
        at = problem.evaluator.selected
        if after:
            moved = {name: theta - after[name] for name, theta in at.items()}
        elif self.steps.taken(checkpoint).momentum:
            raise SpecError(
                f"{self.points.name}: the weights after the step at {checkpoint.name!r} are not "
                "known, and with momentum they are needed; give the whole run, "
                "dattri_unroll.read_run(folder)"
            )
        else:
            batch, size = self.steps.batch(checkpoint), problem.batch
            slope = descent_of(problem.evaluator, checkpoint, batch, self.points.train, size)
            rate, rate_of = checkpoint.learning_rate or 0.0, self.steps.taken(checkpoint).rate_of
            moved = {n: (rate * rate_of(n) * slope[n]).to(theta) for n, theta in at.items()}
        single = {name: value.unsqueeze(0) for name, value in moved.items()}
        rows = from_parameters(problem.source.space, single, torch.zeros(1, dtype=torch.long))
        for step in problem.maps:
            rows = step.map(rows)
        return rows

    def _at(self, checkpoint: Checkpoint, problem: TrainProblem) -> TrainProblem:
        """Return the test set at a checkpoint, its target as the loss that curvatures see."""
        if self._queries is not None:
            return self._queries.problem(checkpoint.position, along=True)
        return evolve(problem, examples=self.points.test)
