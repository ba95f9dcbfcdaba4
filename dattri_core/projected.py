"""Rows that pass linear maps while the source makes them, one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from attrs import define
from torch import Tensor

from dattri_core.blocks import Block, DenseBlock
from dattri_core.capabilities import is_additive
from dattri_core.errors import SpecError
from dattri_core.evaluate import Evaluator, dtype_of
from dattri_core.protocols import BoundSource, LinearMap, Role, Sink
from dattri_core.rows import Rows
from dattri_core.space import Space


def pass_blocks(
    space: Space,
    maps: tuple[LinearMap, ...],
    stream: Callable[[Sink], Mapping[str, Tensor]],
    sink: Sink,
) -> Mapping[str, Tensor]:
    """Hand over the blocks of rows after some maps, of which no more is alive than they need.

    Maps that act block by block are taken at once. A map that is a sum over blocks, such as a flat
    sketch, is taken block by block too, and its parts are added up; another one gets whole rows.

    Args:
        space: Of the rows as they come.
        maps: In the order in which rows pass them.
        stream: Hands each block of the rows to the sink that it is given, and returns their
            auxiliary numbers.
        sink: Takes the mapped blocks.

    Raises:
        SpecError: The blocks that came are not those of the space.
    """
    lead = next((at for at, step in enumerate(maps) if not step.blockwise), len(maps))
    mixing = maps[lead:]
    names: list[str] = []
    held: dict[str, Block] = {}
    totals: dict[str, Tensor] = {}

    def take(name: str, block: Block) -> None:
        names.append(name)
        rows = Rows(space.select([name]), {name: block}, torch.arange(len(block)))
        for step in maps[:lead]:
            rows = step.map(rows)
        if not mixing:
            for mapped, values in rows.blocks.items():
                sink(mapped, values)
        elif not is_additive(mixing[0]):
            held.update(rows.blocks)
        elif rows.blocks:  # a map may leave nothing of a block
            for mapped, values in mixing[0].map(rows).blocks.items():
                part = values.dense().values
                totals[mapped] = totals[mapped] + part if mapped in totals else part

    aux = stream(take)
    require_complete(space, names)
    if not mixing:
        return aux
    before = maps[lead - 1].out_space if lead else space
    rest = mixing
    if is_additive(mixing[0]):
        before, rest = mixing[0].out_space, mixing[1:]
        held.update({name: DenseBlock(total) for name, total in totals.items()})
    rows = Rows(before, held, torch.arange(len(next(iter(held.values())))))
    for step in rest:
        rows = step.map(rows)
    for name, block in rows.blocks.items():
        sink(name, block)
    return aux


def require_complete(space: Space, names: Sequence[str] | Mapping[str, Block]) -> None:
    """Raise `SpecError` when a source did not hand over every block exactly once."""
    if set(names) != set(space.names) or len(names) != len(space):
        raise SpecError(
            f"source: handed over the blocks {sorted(names)}, its space has {sorted(space.names)}; "
            "a source gives each block once for each batch"
        )


@define(eq=False)
class Projected:
    """A source whose rows have passed the projectors that a method begins with.

    Args:
        source: At a checkpoint.
        maps: In the order in which rows pass them.
    """

    source: BoundSource
    maps: tuple[LinearMap, ...]

    @property
    def space(self) -> Space:
        """Return the space after the maps."""
        return self.maps[-1].out_space

    @property
    def evaluator(self) -> Evaluator | None:
        """Return the evaluator of the source, where it has one."""
        return getattr(self.source, "evaluator", None)

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the dtype of the rows before the maps, which may be in more digits."""
        return dtype_of(self.source)

    def stream(self, batch: Any, role: Role, sink: Sink) -> Mapping[str, Tensor]:
        """Hand each block of the mapped rows to the sink."""
        return pass_blocks(
            self.source.space,
            self.maps,
            lambda inner: self.source.stream(batch, role, inner),
            sink,
        )

    def mapped(self, rows: Rows) -> Rows:
        """Return rows of the source after the maps."""

        def stream(sink: Sink) -> Mapping[str, Tensor]:
            for name, block in rows.blocks.items():
                sink(name, block)
            return rows.aux

        blocks: dict[str, Block] = {}
        aux = pass_blocks(self.source.space, self.maps, stream, blocks.__setitem__)
        return Rows(self.space, blocks, rows.index, aux)


def weights_of(source: BoundSource) -> str | None:
    """Return a hash of the weights that a source reads, where it has an evaluator."""
    evaluator = getattr(source, "evaluator", None)
    return evaluator.fingerprint if isinstance(evaluator, Evaluator) else None
