"""One fitted checkpoint: its source and stages, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import evolve, frozen

from dattri_core.activations import activation_bytes
from dattri_core.batch import move
from dattri_core.capabilities import Outlook
from dattri_core.checkpoint import Checkpoint
from dattri_core.evaluate import Evaluator
from dattri_core.outlook import outlook_before_fit, outlook_of
from dattri_core.plans import Costs
from dattri_core.problem import TrainProblem, collect
from dattri_core.protocols import BoundSource, LinearMap, Projector, RandomStream, Source
from dattri_core.routes import contractions_of, gradient_work, routes_of, streams_through
from dattri_core.rows import Rows
from dattri_core.stages import (
    Chain,
    Stage,
    Step,
    all_blockwise,
    check_stages,
    needs_data,
    space_after,
)
from dattri_core.stream import Examples
from dattri_core.task import Task

SAMPLE = 3
FLAT = ("inner products   of flat rows",)


@frozen(eq=False)
class Outline:
    """What a chain costs, known from its steps and from one row.

    Args:
        steps: Maps as they are, and of an inverse what is known of it.
        row: One train row as the source gives it.
        activations: Bytes that a pass keeps for one example.
    """

    steps: tuple[LinearMap | Outlook, ...]
    row: Rows
    activations: int

    def costs(self, *, variants: bool = False, measured: bool = False) -> Costs:
        """Return the costs of one example.

        Args:
            variants: For several dampings at once.
            measured: Train rows pass the test side too, for what a scorer needs of them.
        """
        routes = routes_of(self.steps, self.row, variants=variants, measured=measured)
        return Costs(self.activations, gradient_work(self.row), routes)

    @property
    def after(self) -> Rows | None:
        """Return the row after the train side, or None where a stage mixes its blocks."""
        row = self.row
        if not all(map(streams_through, self.steps)):
            return None
        for step in self.steps:
            if isinstance(step, LinearMap):
                row = step.map(row)
        return row

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what was decided of inverses, and how each block will be contracted."""
        row = self.after
        told = (step.note for step in self.steps if isinstance(step, Outlook) and step.note)
        return (*told, *(FLAT if row is None else contractions_of(row)))


@frozen(eq=False)
class Fitted:
    """A checkpoint with its chain of stages, and what they cost."""

    checkpoint: Checkpoint
    chain: Chain
    outline: Outline
    weights: str | None  # fingerprint of the weights at the time of the fit
    dtype: torch.dtype  # of scores

    @property
    def device(self) -> torch.device:
        """Return where the rows live."""
        evaluator = getattr(self.chain.source, "evaluator", None)
        return evaluator.device if isinstance(evaluator, Evaluator) else torch.device("cpu")


def fit_checkpoint(
    source: Source,
    stages: Sequence[Stage],
    seed: int,
    task: Task,
    checkpoint: Checkpoint,
    examples: Examples,
    memory: int,
    test: Examples | None = None,
    advance: Callable[[int], None] | None = None,
    plan_only: bool = False,
    reference: Examples | None = None,
) -> Fitted:
    """Bind the source at a checkpoint, then build and fit each stage on the train set in order.

    A few test examples, where given, are tried before any stage is fitted. With ``plan_only`` the
    costs are those of all stages, but no inverse Hessian is fitted or in the chain, and projectors
    are fitted on a few examples. Reference examples are those of the task.
    """
    sample = move(examples.sample(SAMPLE), task.device)
    bound = source.bind(task, checkpoint, sample)
    check_stages(stages, bound.space, bound)
    if test is not None:
        collect(bound, test.sample(1), torch.arange(1), "test", task.device)
    evaluator = getattr(bound, "evaluator", None)
    activations = activation_bytes(evaluator, sample) if isinstance(evaluator, Evaluator) else 0
    rows = collect(bound, sample, torch.arange(SAMPLE), "train", task.device)
    row_bytes = [max(1, block.nbytes // SAMPLE) for block in rows.blocks.values()]
    item = max(4, rows.dtype.itemsize)
    # A map that is not blockwise takes whole rows; most form them block by block, then join them.
    whole = sum(row_bytes) + 2 * bound.space.dim * item
    largest = max(row_bytes) if all_blockwise(stages, bound.space) else whole
    per_example = activations + largest
    batch = max(1, min(len(examples), 4096, memory // 8 // per_example))
    chain = Chain(bound)
    outlooks: list[LinearMap | Outlook] = []
    space = bound.space
    step: Step
    for stage in stages:
        before, space = space, space_after(stage, space)
        role = "projector" if isinstance(stage, Projector) else "curvature"
        stream = RandomStream(seed, role, checkpoint.position)
        # A plan only asks what comes out of a projector: a few examples tell.
        few = plan_only and isinstance(stage, Projector)
        data = Examples("train", SAMPLE, "tensors", sample) if few else examples
        problem = TrainProblem(bound, data, chain.maps, batch, stream, memory, advance)
        if reference is not None:
            problem.reference = evolve(
                problem, examples=reference, random=evolve(stream, role="reference"), role="test"
            )
        if plan_only and not isinstance(stage, Projector):
            outlooks.append(outlook_before_fit(stage, before, problem))
            continue
        if isinstance(stage, Projector) and not needs_data(stage):
            step = stage.build(before, stream=stream, device=task.device)
        else:
            step = stage.fit(problem)
        outlooks.append(outlook_of(stage, step, before))
        chain = Chain(bound, (*chain.steps, step))
    dtype = torch.promote_types(rows.dtype, torch.float32)
    outline = Outline(tuple(outlooks), rows.take(slice(0, 1)), activations)
    return Fitted(checkpoint, chain, outline, weights_of(bound), dtype)


def weights_of(source: BoundSource) -> str | None:
    """Return a hash of the weights that a source reads, where it has an evaluator."""
    evaluator = getattr(source, "evaluator", None)
    return evaluator.fingerprint if isinstance(evaluator, Evaluator) else None


def task_of(source: BoundSource, task: Task) -> Task:
    """Return what a source asks of the model: the task, with the loss and target of the source."""
    evaluator = getattr(source, "evaluator", None)
    return evaluator.task if isinstance(evaluator, Evaluator) else task
