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


def pair_rows(ahead: Rows, behind: Rows, scorer: Scorer, queries: Queries) -> Paired:
    """Return the totals of whole train rows, given after the steps of either side."""
    pairing = Pairing(scorer, (queries,))
    pairing.add(ahead)
    pairing.measure(queries.variants[0], ahead, behind)
    (paired,) = pairing.paired(ahead.index, ahead.aux).values()
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
    streaming = [branch.streams for branch in branches]
    names: list[str] = []
    waiting: dict[str, Block] = {}

    def pass_on(rows: Rows, wanted: bool) -> None:
        for branch, pairing, streams in zip(branches, pairings, streaming, strict=True):
            if streams is wanted:
                ahead = branch.chain.train(rows)
                pairing.add(ahead)
                for variant, chain in branch.chains.items():
                    pairing.measure(variant, ahead, chain.test(rows))

    def sink(name: str, block: Block) -> None:
        names.append(name)
        pass_on(Rows(source.space.select([name]), {name: block}, index), wanted=True)
        if not all(streaming):
            waiting[name] = block

    aux = source.stream(move(batch, branches[0].queries[0].device), role, sink)
    require_complete(source.space, names)
    if waiting:
        pass_on(Rows(source.space, waiting, index), wanted=False)
    found = {v: one for pairing in pairings for v, one in pairing.paired(index, aux).items()}
    return [found[variant] for variant in sorted(found)]


@define(eq=False)
class Pairing:
    """Adds up, over blocks, what the scorer pairs and what it wants measured of train rows."""

    scorer: Scorer
    queries: Sequence[Queries]
    by_block: bool = False
    _totals: dict[tuple[int, str], Tensor] = field(factory=dict)
    _own: set[tuple[int, str]] = field(factory=set)
    _sums: dict[tuple[int | None, str], Tensor] = field(factory=dict)

    def add(self, rows: Rows) -> None:
        """Add some blocks of the train rows, after all steps of their side."""
        for name, block in rows.blocks.items():
            if "norm" in self.scorer.needs:
                self._sum(None, "norm", block.pair_inner(block))
            for queries in self.queries:
                here = queries.prepared(name, block)
                for variant, columns, test in queries.meet(name, here):
                    key = (variant, name if self.by_block else WHOLE)
                    self._add(key, columns, self.scorer.pair(here, test), len(queries))

    def measure(self, variant: int, ahead: Rows, behind: Rows) -> None:
        """Add what the scorer wants to know of some blocks of the train rows on the test side.

        Args:
            variant: Whose test side.
            ahead: After the steps of the train side.
            behind: After those of the test side.
        """
        if "self-influence" in self.scorer.needs:
            self._sum(variant, "self-influence", ahead.pair_inner(behind))
        if "inverse-norm" in self.scorer.needs:
            self._sum(variant, "inverse-norm", behind.pair_inner(behind))

    def paired(self, index: Tensor, aux: Mapping[str, Tensor]) -> dict[int, Paired]:
        """Return what has been added up, by variant."""
        found = {}
        for queries in self.queries:
            for variant, side in zip(queries.variants, queries.sides, strict=True):
                train = Side(
                    index,
                    aux,
                    _root(self._sums.get((None, "norm"))),
                    self._sums.get((variant, "self-influence")),
                    _root(self._sums.get((variant, "inverse-norm"))),
                )
                totals = {name: t for (of, name), t in self._totals.items() if of == variant}
                found[variant] = Paired(totals, train, side)
        return found

    def _sum(self, variant: int | None, what: str, part: Tensor) -> None:
        held = self._sums.get((variant, what))
        self._sums[variant, what] = part if held is None else held + part

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


def _root(squares: Tensor | None) -> Tensor | None:
    return None if squares is None else squares.clamp_min(0).sqrt()


def join_sides(sides: Sequence[Side]) -> Side:
    """Join the sides of consecutive batches."""

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        there = [value for value in values if value is not None]
        return torch.cat(there) if there else None

    return Side(
        torch.cat([side.index for side in sides]),
        {key: torch.cat([side.aux[key] for side in sides]) for key in sides[0].aux},
        joined([side.norm for side in sides]),
        joined([side.self_influence for side in sides]),
        joined([side.inverse_norm for side in sides]),
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
