"""The pass backwards over the recorded steps: test rows carried from the end of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from attrs import evolve, field, frozen
from torch import Tensor

from dattri_core import (
    Checkpoint,
    Curvature,
    Evaluator,
    Examples,
    LinearMap,
    NumericsError,
    Projector,
    RandomStream,
    Rows,
    Source,
    Space,
    SpecError,
    Task,
    TrainingStep,
    TrainProblem,
    map_tensors,
)
from dattri_unroll.agreement import require_step
from dattri_unroll.step_problem import StepProblem

CHECKED = 8
"""Steps, evenly spaced, that are compared with what gradient descent would have done."""
COPIES = 4
"""Of the carried test rows that are alive at once: themselves, a product, and what they become."""
LARGEST_BATCH = 4096
SAMPLE = 3

Add = Callable[[int, Tensor, slice, Tensor], None]
"""Takes epoch, positions of train examples ``[B]``, columns, and their scores ``[B, C]``."""


@frozen(eq=False)
class Backward:
    """psi_(s-1) = ((1 - eta_s weight_decay) I - eta_s H_s) psi_s, from the test rows at the end.

    Args:
        source: Of the rows.
        projector: The same map at every step.
        curvature: Fitted on the batch of each step.
        tolerance: Of `require_step`.
        seed: Of the projector, and of what a curvature draws.
        task: Its checkpoints are the run.
        train: The train set.
        test: The test set.
        memory: Bytes to work in.
    """

    source: Source
    projector: Projector
    curvature: Curvature
    tolerance: float
    seed: int
    task: Task
    train: Examples
    test: Examples
    memory: int
    _maps: dict[Space, LinearMap] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        require_fitting_parts(self.source, self.projector, self.curvature)
        for checkpoint in self.task.checkpoints:
            batch = step_of(checkpoint).batch
            if batch is not None and len(batch) and int(batch.max()) >= len(self.train):
                raise SpecError(
                    f"dvemb: the step at {checkpoint.name!r} saw the train example "
                    f"{int(batch.max())}, and the train set has {len(self.train)}; give the train "
                    "set that the run was recorded with, in its order"
                )

    @property
    def work(self) -> int:
        """Return how many rows of train examples one pass evaluates."""
        return sum(len(self._batch(step_of(c))) for c in self.task.checkpoints)

    def columns(self) -> list[slice]:
        """Return the test examples that are carried at once, group by group."""
        problem = self._problem(self.task.checkpoints[-1])
        item = torch.promote_types(problem.dtype, torch.float32).itemsize
        each = COPIES * problem.space.dim * item
        size = max(1, self.memory // 2 // each)
        return [slice(a, min(a + size, len(self.test))) for a in range(0, len(self.test), size)]

    def run(self, columns: slice, add: Add, advance: Callable[[int], None]) -> None:
        """Go through all steps once, last step first, for some of the test examples.

        Args:
            columns: Which test examples.
            add: Takes the scores of each batch.
            advance: Called with the number of rows evaluated.

        Raises:
            NumericsError: The carried rows grow beyond all numbers.
        """
        checkpoints = self.task.checkpoints
        checked = {*np.linspace(0, max(0, len(checkpoints) - 2), CHECKED).astype(int).tolist()}
        carried: Rows | None = None
        after: Mapping[str, Tensor] = {}
        for checkpoint in reversed(checkpoints):
            problem = self._problem(checkpoint)
            evaluator = problem.evaluator
            step, rate = step_of(checkpoint), checkpoint.learning_rate or 0.0
            batch = self._batch(step)
            if carried is None:
                carried = self._test_rows(problem, columns)
            elif checkpoint.position in checked and columns.start == 0 and len(batch):
                given = (checkpoint, batch, self.train, self.tolerance, problem.batch)
                require_step(evaluator, after, *given)
            after = evaluator.selected
            if not len(batch):
                continue
            seen = StepProblem(problem, batch, self.memory // 4)
            scale = len(self.train) * rate / len(batch)
            for part in seen.rows():
                add(step.epoch, part.index, columns, part.inner(carried) * scale)
                advance(len(part))
            if checkpoint.position > 0:
                carried = self._earlier(carried, seen, checkpoint)

    def _earlier(self, carried: Rows, seen: StepProblem, checkpoint: Checkpoint) -> Rows:
        """Return the test rows carried through one more step."""
        rate, decay = checkpoint.learning_rate or 0.0, step_of(checkpoint).weight_decay
        operator = self.curvature.fit(seen)
        product = operator.apply(carried.to(dtype=operator.dtype)).flat().to(carried.dtype)
        flat = carried.flat().mul(1 - rate * decay).sub_(product, alpha=rate)
        if not bool(torch.isfinite(flat).all()):
            raise NumericsError(
                f"dvemb: the test rows carried back to {checkpoint.name!r} are not finite; the "
                "learning rate times an eigenvalue of the curvature is above 2 in many steps, "
                "where gradient descent on it diverges; use the curvature 'hessian', which is that "
                "of the run itself, or train with a smaller learning rate"
            )
        return Rows.from_flat(carried.space, flat, carried.index)

    def _test_rows(self, problem: TrainProblem, columns: slice) -> Rows:
        asked = evolve(problem, examples=self.test, role="test")
        index = torch.arange(columns.start, columns.stop)
        dtype = torch.promote_types(problem.dtype, torch.float32)
        flat = torch.cat([part.flat().to(dtype) for part in asked.rows(index)])
        return Rows.from_flat(problem.space, flat, index)

    def _problem(self, checkpoint: Checkpoint) -> TrainProblem:
        """Return the train set at a checkpoint, after the projector."""
        device = self.task.device
        bound = self.source.bind(self.task, checkpoint, self._sample())
        if not isinstance(getattr(bound, "evaluator", None), Evaluator):
            raise SpecError(
                f"dvemb: the rows of {type(self.source).__name__} are not gradients of parameters, "
                "which steps of gradient descent are made of; use the source 'per-example' or "
                "'functional'"
            )
        if bound.space not in self._maps:
            # One sketch for all steps: the carried rows stay in its space.
            stream = RandomStream(self.seed, "projector")
            self._maps[bound.space] = self.projector.build(
                bound.space, stream=stream, device=device
            )
        each = bound.space.dim * 4
        size = max(1, min(LARGEST_BATCH, self.memory // 8 // each))
        random = RandomStream(self.seed, "curvature", checkpoint.position)
        maps = (self._maps[bound.space],)
        problem = TrainProblem(bound, self.train, maps, size, random, self.memory // 4)
        if "apply" not in self.curvature.gives(problem.space):
            raise SpecError(
                f"dvemb: the curvature {type(self.curvature).__name__} gives "
                f"{sorted(self.curvature.gives(problem.space))} and no products with rows; use "
                "'gauss-newton', 'ggn' or 'hessian'"
            )
        return problem

    def _sample(self) -> object:
        return map_tensors(lambda t: t.to(self.task.device), self.train.sample(SAMPLE))

    def _batch(self, step: TrainingStep) -> Tensor:
        return torch.arange(len(self.train)) if step.batch is None else step.batch.cpu()


def step_of(checkpoint: Checkpoint) -> TrainingStep:
    """Return the step that was taken from a checkpoint.

    Raises:
        SpecError: It was not recorded.
    """
    if checkpoint.step is None:
        raise SpecError(
            f"dvemb: it is not known which step was taken from the checkpoint {checkpoint.name!r}; "
            "record the training with dattri_unroll.record(model, optimizer, folder) and give "
            "Task(model, loss, checkpoints=dattri_unroll.read_run(folder))"
        )
    return checkpoint.step


def require_fitting_parts(source: Source, projector: Projector, curvature: Curvature) -> None:
    """Raise `SpecError` when parts cannot be carried over steps together; without a tensor."""
    if hasattr(source, "members"):
        raise SpecError(
            f"dvemb: the source {type(source).__name__} makes several networks of a checkpoint, "
            "and a run is the steps of one; use 'per-example' or 'functional'"
        )
    if getattr(projector, "needs", frozenset()):
        raise SpecError(
            f"dvemb: the projector {type(projector).__name__} is fitted on data and would be "
            "another one at each step, but rows are carried from step to step in one space; use a "
            "random projector"
        )
    products = {"hessian-product", "ggn-product"} & curvature.needs
    if products and "adjoint" not in projector.gives:
        raise SpecError(
            f"dvemb: the curvature {type(curvature).__name__} needs products with parameters, and "
            f"the projector {type(projector).__name__} has no adjoint to lead back to them; use "
            "the curvature 'gauss-newton', or a projector that gives 'adjoint'"
        )
    if "reference-rows" in curvature.needs:
        raise SpecError(
            f"dvemb: the curvature {type(curvature).__name__} mixes in reference examples, and the "
            "curvature of a step is that of its batch; use 'gauss-newton', 'ggn' or 'hessian'"
        )
