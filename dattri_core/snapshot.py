"""One fitted checkpoint: its source and stages, what they cost, and the scores of one tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from attrs import define, frozen
from torch import Tensor

from dattri_core.activations import activation_bytes
from dattri_core.batch import Batch, batch_size, move, take
from dattri_core.blocks import Block, explain_inner
from dattri_core.checkpoint import Checkpoint
from dattri_core.errors import MemoryBudgetError, NumericsError
from dattri_core.evaluate import Evaluator
from dattri_core.memory import Costs, is_out_of_memory
from dattri_core.problem import TrainProblem, collect, require_complete
from dattri_core.protocols import (
    BoundSource,
    Projector,
    RandomStream,
    Role,
    Scorer,
    Side,
    Source,
)
from dattri_core.rows import Rows
from dattri_core.stages import Chain, Stage, Step, check_stages
from dattri_core.stream import Examples
from dattri_core.task import Task

SAMPLE = 3
T = TypeVar("T")


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

    def costs(self, *, variants: bool = False) -> Costs:
        """Return the costs of one example, for one damping or for several at once."""
        routes = routes_of(self.steps, self.row, self.activations, variants=variants)
        return Costs(self.activations, gradient_work(self.row), routes)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return how each block will be contracted."""
        row, maps = self.row, [step for step in self.steps if isinstance(step, LinearMap)]
        if not all(step.blockwise for step in maps):
            return ("inner products   of flat rows",)
        for step in maps:
            row = step.map(row)
        return contractions_of(row)


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
) -> Fitted:
    """Bind the source at a checkpoint, then build and fit each stage on the train set in order.

    A few test examples, where given, are tried before any stage is fitted.
    """
    sample = move(examples.sample(SAMPLE), task.device)
    bound = source.bind(task, checkpoint, sample)
    check_stages(stages, bound.space)
    if test is not None:
        collect(bound, test.sample(1), torch.arange(1), "test", task.device)
    evaluator = getattr(bound, "evaluator", None)
    activations = activation_bytes(evaluator, sample) if isinstance(evaluator, Evaluator) else 0
    rows = collect(bound, sample, torch.arange(SAMPLE), "train", task.device)
    row_bytes = [max(1, block.nbytes // SAMPLE) for block in rows.blocks.values()]
    item = max(4, rows.dtype.itemsize)
    # A map that is not blockwise takes whole rows; most form them block by block, then join them.
    whole = sum(row_bytes) + 2 * bound.space.dim * item
    largest = max(row_bytes) if all_blockwise(stages) else whole
    per_example = activations + largest
    batch = max(1, min(len(examples), 4096, memory // 8 // per_example))
    chain = Chain(bound)
    step: Step
    for stage in stages:
        if isinstance(stage, Projector):
            stream = RandomStream(seed, "projector", checkpoint.position)
            step = stage.build(chain.space, stream=stream, device=task.device)
        else:
            step = stage.fit(
                TrainProblem(
                    source=bound,
                    examples=examples,
                    maps=chain.maps,
                    batch=batch,
                    random=RandomStream(seed, "curvature", checkpoint.position),
                    memory=memory,
                    advance=advance,
                )
            )
        chain = Chain(bound, (*chain.steps, step))
    steps = tuple(outlook_of(stage, step) for stage, step in zip(stages, chain.steps, strict=True))
    dtype = torch.promote_types(rows.dtype, torch.float32)
    outline = Outline(steps, rows.take(slice(0, 1)), activations)
    return Fitted(checkpoint, chain, outline, weights_of(bound), dtype)


def all_blockwise(stages: Sequence[Stage]) -> bool:
    """Return whether only stages that certainly act block by block come before the scorer."""
    return all(not isinstance(s, Projector) or "keeps-factors" in s.gives for s in stages)


def weights_of(source: BoundSource) -> str | None:
    """Return a hash of the weights that a source reads, where it has an evaluator."""
    evaluator = getattr(source, "evaluator", None)
    return evaluator.fingerprint if isinstance(evaluator, Evaluator) else None
