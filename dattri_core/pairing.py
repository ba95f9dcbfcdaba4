"""Pairing: train rows, block by block as they come, with the queries that wait for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from dattri_core.batch import Batch, move
from dattri_core.blocks import Block
from dattri_core.blocks.finite import all_finite
from dattri_core.capabilities import BilinearScorer
from dattri_core.checkpoint import Checkpoint
from dattri_core.errors import NumericsError
from dattri_core.measures import Known, Measures
from dattri_core.projected import require_complete
from dattri_core.protocols import BoundSource, Role, Scorer, Side
from dattri_core.queries import Branch, Queries
from dattri_core.rows import Rows

ALL = -1
"""Stands for every variant at once."""
WHOLE = ""
"""Stands for the sum over all blocks where a block's name would stand."""


@frozen(eq=False)
class Paired:
    """What one batch of train rows gave, for one variant: totals ``[B, C]``, by block or summed."""

    totals: dict[str, Tensor]
    train: Side
    test: Side


def pair_batch(
    source: BoundSource,
    branches: Sequence[Branch],
    scorer: Scorer,
    index: Tensor,
    batch: Batch,
    role: Role,
    *,
    by_block: bool = False,
    known: Known | None = None,
) -> list[Paired]:
    """Return the totals of a batch for each variant; rows go as they come.

    Args:
        source: Gives the rows.
        branches: Train sides, and the queries at their ends.
        scorer: Pairs rows.
        index: Positions of the examples.
        batch: The examples.
        role: Of the rows.
        by_block: Whether totals are told apart by block.
        known: What was measured of train rows by earlier passes; what this one measures is added.
    """
    pairings = [Pairing(scorer, branch.queries, by_block) for branch in branches]
    if known is not None and known.covers(index):
        branches = [evolve(branch, chains={}) for branch in branches]
    streaming = [branch.streams for branch in branches]
    names: list[str] = []
    waiting: dict[str, Block] = {}

    def pass_on(rows: Rows, wanted: bool) -> None:
        for branch, pairing, streams in zip(branches, pairings, streaming, strict=True):
            if streams is not wanted:
                continue
            both = {variant: chain.both(rows) for variant, chain in branch.chains.items()}
            ahead = next((one for one, _ in both.values()), None)
            pairing.add(
                branch.chain.train(rows) if ahead is None else ahead,
                {variant: behind for variant, (_, behind) in both.items()},
            )

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
    if known is not None:
        if not known.covers(index):
            known.keep({variant: one.train for variant, one in found.items()})
        for variant, one in found.items():
            like = next(iter(one.totals.values()))
            found[variant] = evolve(one, train=known.added(variant, one.train, like))
    return [found[variant] for variant in sorted(found)]


@define(eq=False)
class Pairing:
    """Adds up, over blocks, what the scorer pairs and what it needs to know of train rows."""

    scorer: Scorer
    queries: Sequence[Queries]
    by_block: bool = False
    _totals: dict[tuple[int, str], Tensor] = field(factory=dict)
    _own: set[tuple[int, str]] = field(factory=set)
    _measures: dict[int, Measures] = field(factory=dict)

    def add(self, ahead: Rows, behind: Mapping[int, Rows]) -> None:
        """Add some blocks of the train rows.

        Args:
            ahead: After the steps of the train side.
            behind: After those of the test side of each variant, where they are measured there.
        """
        for variant, rows in behind.items() or ((ALL, None),):
            self._measures.setdefault(variant, Measures(self.scorer.needs)).add(ahead, rows)
        for name, block in ahead.blocks.items():
            total = name if self.by_block else WHOLE
            for queries in self.queries:
                width = len(queries)
                carried = queries.carried(name, block) if self._bilinear else None
                if carried is not None:
                    key = queries.variants[0], total
                    for columns, test in queries.waiting(name):
                        self._add(key, columns, self.scorer.pair(carried, test), width)
                    continue
                here = queries.prepared(name, block)
                if not queries.slab:  # the variants at one go: the train rows are turned once
                    part = self.scorer.pair(here, queries.resident(name, here))
                    for variant, columns in queries.apart():
                        self._add((variant, total), slice(None), part[:, columns], width)
                    continue
                for variant, columns, test in queries.meet(name, here):
                    self._add((variant, total), columns, self.scorer.pair(here, test), width)

    @property
    def _bilinear(self) -> bool:
        return isinstance(self.scorer, BilinearScorer) and self.scorer.bilinear

    def paired(self, index: Tensor, aux: Mapping[str, Tensor]) -> dict[int, Paired]:
        """Return what has been added up, by variant."""
        found = {}
        for queries in self.queries:
            for variant, side in zip(queries.variants, queries.sides, strict=True):
                measures = self._measures.get(variant) or self._measures[ALL]
                totals = {name: t for (of, name), t in self._totals.items() if of == variant}
                found[variant] = Paired(totals, measures.side(index, aux), side)
        return found

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


def require_finite(values: Tensor, index: Tensor, checkpoint: Checkpoint) -> None:
    """Raise when a score of a batch is not finite."""
    if all_finite(values):
        return
    rows, columns = torch.nonzero(~torch.isfinite(values), as_tuple=True)
    raise NumericsError(
        f"scores: not finite at checkpoint {checkpoint.name!r}, train example "
        f"{int(index[rows[0].cpu()])}, query {int(columns[0])}; look for a diverged checkpoint, or "
        "for numbers that overflow half precision"
    )
