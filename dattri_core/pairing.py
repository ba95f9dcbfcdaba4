"""Pairing: train rows, block by block as they come, with the queries that wait for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import define, field, frozen
from torch import Tensor

from dattri_core.batch import Batch, move
from dattri_core.blocks import Block
from dattri_core.checkpoint import Checkpoint
from dattri_core.errors import NumericsError
from dattri_core.problem import require_complete
from dattri_core.protocols import BoundSource, Role, Scorer, Side
from dattri_core.queries import Branch, Queries
from dattri_core.rows import Rows

WHOLE = ""
"""Stands for the sum over all blocks where a block's name would stand."""


@frozen(eq=False)
class Paired:
    """What one batch of train rows gave, for one variant: totals ``[B, C]``, by block or summed."""

    totals: dict[str, Tensor]
    train: Side
    test: Side


def pair_rows(rows: Rows, scorer: Scorer, queries: Queries) -> Paired:
    """Return the totals of whole train rows after all steps of their side."""
    pairing = Pairing(scorer, (queries,))
    pairing.add(rows)
    (paired,) = pairing.paired(rows.index, rows.aux).values()
    return paired


def pair_batch(
    source: BoundSource,
    branches: Sequence[Branch],
    scorer: Scorer,
    index: Tensor,
    batch: Batch,
    role: Role,
    *,
    by_block: bool = False,
) -> list[Paired]:
    """Return the totals of a batch for each variant; rows go as they come."""
    pairings = [Pairing(scorer, branch.queries, by_block) for branch in branches]
    device = branches[0].queries[0].device
    streaming = [branch.chain.blockwise for branch in branches]
    names: list[str] = []
    waiting: dict[str, Block] = {}

    def sink(name: str, block: Block) -> None:
        names.append(name)
        for branch, pairing, streams in zip(branches, pairings, streaming, strict=True):
            if streams:
                pairing.add(branch.chain.train_block(name, block, index))
        if not all(streaming):
            waiting[name] = block

    aux = source.stream(move(batch, device), role, sink)
    require_complete(source.space, names)
    if waiting:
        rows = Rows(source.space, waiting, index)
        for branch, pairing, streams in zip(branches, pairings, streaming, strict=True):
            if not streams:
                pairing.add(branch.chain.train(rows))
    found = {v: one for pairing in pairings for v, one in pairing.paired(index, aux).items()}
    return [found[variant] for variant in sorted(found)]


@define(eq=False)
class Pairing:
    """Adds up, over blocks, what the scorer pairs and the squared norms it needs."""

    scorer: Scorer
    queries: Sequence[Queries]
    by_block: bool = False
    _totals: dict[tuple[int, str], Tensor] = field(factory=dict)
    _own: set[tuple[int, str]] = field(factory=set)
    _square: Tensor | None = None

    def add(self, rows: Rows) -> None:
        """Add some blocks of the train rows, after all steps of their side."""
        for name, block in rows.blocks.items():
            if "norm" in self.scorer.needs:
                square = block.pair_inner(block)
                self._square = square if self._square is None else self._square + square
            for queries in self.queries:
                here = queries.prepared(name, block)
                for variant, columns, test in queries.meet(name, here):
                    key = (variant, name if self.by_block else WHOLE)
                    self._add(key, columns, self.scorer.pair(here, test), len(queries))

    def _add(self, key: tuple[int, str], columns: slice, part: Tensor, width: int) -> None:
        held = self._totals.get(key)
        if columns != slice(None):
            if held is None:
                held = self._totals[key] = part.new_zeros(len(part), width)
                self._own.add(key)
            held[:, columns] += part
        elif held is None:  # the first part belongs to the scorer
            self._totals[key] = part
        elif key in self._own:
            held += part
        else:
            self._totals[key] = held + part
            self._own.add(key)

    def paired(self, index: Tensor, aux: Mapping[str, Tensor]) -> dict[int, Paired]:
        """Return what has been added up, by variant."""
        norm = None if self._square is None else self._square.clamp_min(0).sqrt()
        train = Side(index, aux, norm)
        sides = {
            variant: side
            for queries in self.queries
            for variant, side in zip(queries.variants, queries.sides, strict=True)
        }
        return {
            variant: Paired(
                {name: t for (of, name), t in self._totals.items() if of == variant}, train, side
            )
            for variant, side in sides.items()
        }


def join_sides(sides: Sequence[Side]) -> Side:
    """Join the sides of consecutive batches."""
    first = sides[0]
    norms = [side.norm for side in sides if side.norm is not None]
    return Side(
        torch.cat([side.index for side in sides]),
        {key: torch.cat([side.aux[key] for side in sides]) for key in first.aux},
        torch.cat(norms) if norms else None,
    )


def require_finite(values: Tensor, index: Tensor, checkpoint: Checkpoint) -> None:
    """Raise when a score of a batch is not finite."""
    # One pass: a sum is finite only if all of its terms are.
    if torch.isfinite(values.sum()) or torch.isfinite(values).all():
        return
    rows, columns = torch.nonzero(~torch.isfinite(values), as_tuple=True)
    raise NumericsError(
        f"scores: not finite at checkpoint {checkpoint.name!r}, train example "
        f"{int(index[rows[0].cpu()])}, query {int(columns[0])}; look for a diverged checkpoint, or "
        "for numbers that overflow half precision"
    )
