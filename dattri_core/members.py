"""Members: the networks that a source makes of one checkpoint, each a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import evolve

from dattri_core.checkpoint import Checkpoint
from dattri_core.protocols import Source
from dattri_core.source_capabilities import EnsembleSource


def expand_checkpoints(source: Source, checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Return the checkpoints that a fold sees: of an `EnsembleSource` every member of each.

    Members have places of their own, so that projectors and curvatures draw independent numbers
    for each. They share the learning rate of their checkpoint equally: a sum over checkpoints
    weighted by it stays on its scale.
    """
    if not isinstance(source, EnsembleSource):
        return tuple(checkpoints)
    count = source.members
    return tuple(
        evolve(
            checkpoint,
            name=f"{checkpoint.name}, member {member}",
            position=at * count + member,
            count=len(checkpoints) * count,
            learning_rate=None
            if checkpoint.learning_rate is None
            else checkpoint.learning_rate / count,
            member=member,
        )
        for at, checkpoint in enumerate(checkpoints)
        for member in range(count)
    )
