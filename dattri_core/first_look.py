"""The first look at a source: its rows of a few examples, and the projectors that it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import frozen
from torch import Tensor

from dattri_core.batch import Batch
from dattri_core.checkpoint import Checkpoint
from dattri_core.errors import SpecError
from dattri_core.memory import is_out_of_memory
from dattri_core.problem import collect
from dattri_core.projected import Projected
from dattri_core.protocols import BoundSource, LinearMap, Projector, RandomStream, Source
from dattri_core.rows import Rows
from dattri_core.source_capabilities import RehearsedSource, ReopenedSource
from dattri_core.space import Space
from dattri_core.stages import Stage, needs_data
from dattri_core.stored import Formed, Keeping
from dattri_core.task import Task


@frozen(eq=False)
class FirstLook:
    """A source at a checkpoint, and its train rows of a few examples.

    Args:
        source: The source.
        raw: Its rows.
        front: The projectors that it takes by itself.
        rows: The rows after these.
    """

    source: BoundSource
    raw: Rows
    front: tuple[LinearMap, ...]
    rows: Rows

    @staticmethod
    def of(source: BoundSource, raw: Rows, front: tuple[LinearMap, ...]) -> FirstLook:
        """Return the look, with the rows after the projectors."""
        return FirstLook(source, raw, front, Projected(source, front).mapped(raw) if front else raw)


def reopen(
    source: Source,
    task: Task,
    checkpoint: Checkpoint,
    sample: Batch,
    keeping: Keeping,
    look: Callable[[BoundSource], FirstLook],
) -> FirstLook | None:
    """Return the first look at a source whose rows a store has; None where it must be bound.

    To bind a source takes as many passes as a handful of examples: it looks whether the loss mixes
    examples, is random, or goes past the modules. Rows on disk have passed these looks, so equal
    rows of the sample, in another order, tell the same by one pass.

    Args:
        source: Not bound yet.
        task: What it is asked of.
        checkpoint: Whose rows they are.
        sample: What it would be bound on.
        keeping: The store.
        look: At a source at a checkpoint.
    """
    if not isinstance(source, ReopenedSource) or not keeping.whole:
        return None
    try:
        seen = look(source.reopen(task, checkpoint, sample))
        found = keeping.holds(seen.rows)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None  # what is wrong with the model or the loss is said by `bind`
    return seen if found else None


def first_rows(source: BoundSource, sample: Batch, index: Tensor, device: torch.device) -> Rows:
    """Return the train rows of the sample, which some sources have made at bind."""
    blocks = source.first_rows() if isinstance(source, RehearsedSource) else None
    if blocks is None:
        return collect(source, sample, index, "train", device)
    return Rows(source.space, blocks, index)


def streams_of(stages: Sequence[Stage], seed: int, position: int) -> list[RandomStream]:
    """Return the random numbers of each stage: two projectors of one kind are two matrices."""
    streams, projectors = [], 0
    for stage in stages:
        role = "curvature"
        if isinstance(stage, Projector):
            role = "projector" if projectors == 0 else f"projector {projectors}"
            projectors += 1
        streams.append(RandomStream(seed, role, position))
    return streams


def front_of(
    stages: Sequence[Stage],
    space: Space,
    streams: Sequence[RandomStream],
    device: torch.device,
    *,
    stored: bool,
) -> tuple[LinearMap, ...]:
    """Return the maps that the source takes by itself: while it makes rows, or before the store.

    Those are the projectors that a method begins with, up to the last that leaves no factors;
    before a store all of them.
    """
    front: list[LinearMap] = []
    taken = 0
    for stage, stream in zip(stages, streams, strict=True):
        if not isinstance(stage, Projector):
            break
        if needs_data(stage):
            if stored:
                raise SpecError(
                    f"store: the projector {type(stage).__name__} is fitted on the train set, and "
                    "a store keeps rows whose projectors need no data; use a random one "
                    "(initialisation='random'), or leave store= out"
                )
            break
        front.append(stage.build(space, stream=stream, device=device))
        space = front[-1].out_space
        if "keeps-factors" not in stage.gives:
            taken = len(front)
    if stored:
        return (*front, Formed(space))
    return tuple(front[:taken])
