"""Making queries: from the test rows of a group to where its route lets them wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from dattri_core.batch import Batch, move
from dattri_core.blocks import Block, DenseBlock, SweptBlock, compact, concatenate, joins
from dattri_core.capabilities import SharingInverse, SpectralInverse
from dattri_core.contract import limit_now
from dattri_core.errors import SpecError
from dattri_core.halving import halving
from dattri_core.measures import needs_inverse, root
from dattri_core.plans import Plan, Route
from dattri_core.problem import collect
from dattri_core.projected import require_complete
from dattri_core.protocols import BoundSource, LinearMap, Scorer, Side
from dattri_core.queries import Branch, Queries, require_finite_queries, rows_in
from dattri_core.rows import Rows
from dattri_core.shelf import Shelf
from dattri_core.stages import Chain, Step, is_inverse, taken
from dattri_core.stream import Examples


@frozen(eq=False)
class Variants:
    """The test sides of a run at one checkpoint: one, or one for each damping of a sweep.

    Args:
        base: The chain as it was fitted.
        count: How many there are.
        chain: Gives the chain of each; one is held no longer than it is needed.
        shared: Steps of the test side that all have in common.
    """

    base: Chain
    count: int
    chain: Callable[[int], Chain]
    shared: int

    @property
    def branches(self) -> list[tuple[int, ...]]:
        """Return the variants by train side: all, or each alone where that side is damped too."""
        damped = any(hasattr(step, "with_damping") for step in self.base.maps)
        everyone = range(self.count)
        return [(k,) for k in everyone] if damped else [tuple(everyone)]


def make_branches(
    variants: Variants,
    scorer: Scorer,
    examples: Examples,
    columns: range,
    plan: Plan,
    device: torch.device,
    place: str,
    shelf: Shelf,
    *,
    summed: bool = False,
) -> list[Branch]:
    """Return the queries of some columns of the scores, by the train sides that they wait for.

    Args:
        variants: The test sides.
        scorer: Says which numbers of a query it reads.
        examples: The test set.
        columns: Positions in it; with ``summed``, one column for the sum of all rows.
        plan: Route and sizes.
        device: Where they meet train rows.
        place: Of the checkpoint, for messages.
        shelf: Where queries wait that are kept on disk.
        summed: Whether the rows are added up as the source gives them.
    """
    making = [
        Making(variants, group, plan.route, plan.slab, device, place, summed, shelf)
        for group in variants.branches
    ]
    source = variants.base.source

    def take(rows: Rows) -> None:
        for branch in making:
            branch.take(rows)

    def gather(index: Tensor, part: Batch) -> None:
        take(collect(source, part, index, "test", device))

    if summed:
        take(sum_rows(source, examples, plan.test_batch, device))
    else:
        for index, part in examples.batches(plan.test_batch, columns.start, columns.stop):
            halving(gather, index, part, "test rows")
    return [branch.finish(scorer) for branch in making]


def sum_rows(source: BoundSource, examples: Examples, batch: int, device: torch.device) -> Rows:
    """Return one row, the sum of all test rows as the source gives them; one block at a time."""
    totals: dict[str, Tensor] = {}

    def work(index: Tensor, part: Batch) -> None:
        sums: dict[str, Tensor] = {}  # of this batch: one that fails half-way has added nothing

        def sink(name: str, block: Block) -> None:
            sums[name] = block.combine(torch.ones(1, len(block)))

        source.stream(move(part, device), "test", sink)
        require_complete(source.space, list(sums))
        for name, value in sums.items():
            totals[name] = totals[name] + value if name in totals else value

    for index, part in examples.batches(batch):
        halving(work, index, part, "test rows")
    blocks: dict[str, Block] = {name: DenseBlock(value) for name, value in totals.items()}
    return Rows(source.space, blocks, torch.zeros(1, dtype=torch.long))


class _OfASum(Mapping[str, Tensor]):
    """The auxiliary numbers of a sum of rows: there are none, and asking for one is an error."""

    def __getitem__(self, name: str) -> Tensor:
        raise SpecError(
            f"attribute(group=True): the scorer reads {name!r} of a test row, and a sum of rows "
            "has none; use a scorer that reads rows alone, such as 'dot' or 'cosine'"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


# --- one branch -----------------------------------------------------------------------------------
@define(eq=False)
class Making:
    """One branch while test rows come in, batch by batch.

    Args:
        variants: The test sides of the run.
        group: Those that belong to this branch.
        route: How far the rows go.
        slab: Bytes for rows of one block while they pass a step.
        device: Where they meet train rows.
        place: Of the checkpoint, for messages.
        summed: Whether a row is the sum of those of several examples.
        shelf: Where queries wait that are kept on disk.
    """

    variants: Variants
    group: tuple[int, ...]
    route: Route
    slab: int
    device: torch.device
    place: str
    summed: bool
    shelf: Shelf
    _late: int = field(init=False)  # the first step that wants all rows of the group at once
    _common: int = field(init=False)  # steps taken batch by batch, the same for all variants
    _chains: dict[int, Chain] = field(factory=dict, init=False)
    _pieces: list[list[Rows]] = field(init=False)

    def __attrs_post_init__(self) -> None:
        steps, cut = self.variants.base.test_steps, self.route.cut
        whole = (k for k in range(cut) if not _passes_batches(steps[k]))
        self._late = min(whole, default=cut)
        self._common = self._late if len(self.group) == 1 else min(self.variants.shared, self._late)
        if self.route.deferred or self._common < self._late or len(self.group) == 1:
            self._chains = {k: self.variants.chain(k) for k in self.group}
        together = self.route.deferred or self.route.swept
        self._pieces = [[] for _ in self.group[: 1 if together else None]]

    def take(self, rows: Rows) -> None:
        """Take a batch of rows as the source gives them."""
        first = self._chains.get(self.group[0], self.variants.base)
        rows = pass_in_slabs(first.test_steps[: self._common], rows, self.slab)
        for pieces, passed in zip(self._pieces, self._each(rows), strict=False):
            if self.route.swept:
                passed = passed.map_blocks(lambda _, block: compact(block))
            pieces.append(self._stored(passed))

    def _each(self, rows: Rows) -> Iterator[Rows]:
        """Yield rows that have passed the common steps after those of each variant."""
        chains = [self._chains.get(k, self.variants.base) for k in self.group]
        steps = [chain.test_steps[self._common : self._late] for chain in chains]
        firsts = [own[0] for own in steps if own]
        if len(firsts) > 1 and len(self._pieces) > 1 and isinstance(firsts[0], SharingInverse):
            for own, passed in zip(steps, invert_each(firsts, rows, self.slab), strict=True):
                yield pass_in_slabs(own[1:], passed, self.slab)
            return
        for own in steps:
            yield pass_in_slabs(own, rows, self.slab)

    def finish(self, scorer: Scorer) -> Branch:
        """Return the branch; a scorer says which numbers of its queries it reads."""
        made: list[Queries] = []
        stats: list[tuple[int, Any]] = []
        resident = not self.route.deferred and not self.route.offloaded
        if self.route.swept:
            queries, stats = self._swept(join_rows(self._pieces.pop()))
            made.append(queries)
        taken = self._together()
        for k, pieces in zip(self.group, self._pieces, strict=False):
            chain = self._chains.get(k) or self.variants.chain(k)
            late = chain.test_steps[self._late + taken : self.route.cut]
            if resident or late:
                pieces.append(join_rows(pieces))
            if late:
                whole = pieces.pop().to(self.device)
                pieces.append(self._stored(pass_in_slabs(late, whole, self.slab)))
            if resident:
                require_finite_queries(pieces[0].blocks, pieces[0].index, self.place)
            mine = self.group if self.route.deferred else (k,)
            queries = Queries(
                pieces=tuple(pieces),
                tails=tuple(self._tail(self._chains.get(v, chain)) for v in mine),
                sides=(),
                variants=mine,
                device=self.device,
                slab=0 if resident else self.slab,
                place=self.place,
                release=self.shelf.release,
            )
            made.append(queries)
            stats += [(v, _stats(self._chains.get(v, chain))) for v in mine]
        if resident:
            made = stacked(made)
        for queries in made:
            queries.sides = sides_of(queries, scorer, summed=self.summed)
        train_side = self._chains.get(self.group[0], self.variants.base)
        measured = self.group if needs_inverse(scorer) else ()
        behind = {k: self._chains.get(k) or self.variants.chain(k) for k in measured}
        return Branch(train_side, tuple(made), dict(stats), behind)

    def _together(self) -> int:
        """Take the inverses of all variants at once where they share work; return steps taken.

        Those that want all rows of the group at once: others took them batch by batch.
        """
        alike = len(self._pieces) > 1 and self._common == self._late < self.route.cut
        if not alike or not isinstance(self._step(self.group[0]), SharingInverse):
            return 0
        self._chains = {k: self.variants.chain(k) for k in self.group}
        pieces = self._pieces[0]
        for others in self._pieces[1:]:  # the same rows
            others.clear()
        whole = join_rows(pieces).to(self.device)
        answers = invert_each([self._step(k) for k in self.group], whole, self.slab)
        self._pieces = [[self._stored(rows)] for rows in answers]
        return 1

    def _step(self, variant: int) -> Step:
        chain = self._chains.get(variant) or self.variants.chain(variant)
        return chain.test_steps[self._late]

    def _swept(self, rows: Rows) -> tuple[Queries, list[tuple[int, Any]]]:
        """Return the queries of all dampings, in the basis of the inverse, and the reports."""
        dampings: dict[str, list[float]] = {name: [] for name in rows.space.names}
        eigenvalues: dict[str, Tensor] = {}
        stats = []
        for k in self.group:
            chain = self._chains.get(k) or self.variants.chain(k)
            inverse = chain.steps[-1]
            assert isinstance(inverse, SpectralInverse)
            assert inverse.spectrum is not None
            for name, (values, damping) in inverse.spectrum.items():
                eigenvalues[name] = values
                dampings[name].append(damping)
            stats.append((k, _stats(chain)))
        require_finite_queries(rows.blocks, rows.index, self.place)
        count = len(self.group)
        blocks: dict[str, Block] = {
            name: SweptBlock(
                block,
                eigenvalues[name].to(self.device),
                torch.tensor(dampings[name], dtype=torch.float64, device=self.device),
            )
            for name, block in rows.blocks.items()
        }
        aux = {key: torch.cat([values] * count) for key, values in rows.aux.items()}
        queries = Queries(
            pieces=(Rows(rows.space, blocks, rows.index.repeat(count), aux),),
            tails=((),) * count,
            sides=(),
            variants=self.group,
            device=self.device,
            slab=0,
            place=self.place,
        )
        return queries, stats

    def _tail(self, chain: Chain) -> tuple[Step, ...]:
        return chain.test_steps[self.route.cut :]

    def _stored(self, rows: Rows) -> Rows:
        if not self.route.offloaded:
            return rows
        rows = rows.to("cpu")
        return self.shelf.put(rows) if self.route.offloaded == "disk" else rows


def _stats(chain: Chain) -> list[Mapping[str, float]]:
    return [dict(inverse.stats) for inverse in chain.inverses if inverse.stats]


def sides_of(queries: Queries, scorer: Scorer, *, summed: bool = False) -> tuple[Side, ...]:
    """Return what the scorer may read of queries, once for each variant."""
    own = slice(0, len(queries))  # of the first variant: all have the same
    index = torch.cat([piece.index for piece in queries.pieces])[own]
    first = queries.pieces[0]
    aux: Mapping[str, Tensor] = {
        key: torch.cat([piece.aux[key] for piece in queries.pieces])[own].to(queries.device)
        for key in first.aux
    }
    if summed:
        aux = _OfASum()
    if "norm" not in scorer.needs:
        return (Side(index, aux, None),) * len(queries.tails)
    squares: dict[int, Tensor] = {}
    for name in first.space.names:
        for variant, here, block in queries.meet(name):
            part = block.pair_inner(block)
            held = squares.setdefault(variant, part.new_zeros(len(queries)))
            held[here] += part
    return tuple(Side(index, aux, root(squares[variant])) for variant in queries.variants)


def stacked(queries: Sequence[Queries]) -> list[Queries]:
    """Return resident queries of several variants as one, where that forms nothing.

    Train rows then meet all variants in one product. Larger queries than a contraction may use stay
    apart: while they are joined, one block of all of them is there twice.
    """
    rows = [one.pieces[0] for one in queries]
    blocks = [[one.blocks[name] for one in rows] for name in rows[0].space.names]
    largest = max(sum(block.nbytes for block in of_all) for of_all in blocks)
    if len(queries) == 1 or largest > limit_now() or not all(map(joins, blocks)):
        return list(queries)
    del blocks
    for one in queries:
        one.pieces = ()
    return [
        evolve(
            queries[0],
            pieces=(join_rows(rows),),
            tails=tuple(one.tails[0] for one in queries),
            variants=tuple(one.variants[0] for one in queries),
        )
    ]


def join_rows(pieces: list[Rows]) -> Rows:
    """Return rows one after another, block by block, and empty the list: no copy of all is made."""
    first, index = pieces[0], torch.cat([piece.index for piece in pieces])
    aux = {key: torch.cat([piece.aux[key] for piece in pieces]) for key in first.aux}
    waiting = [dict(piece.blocks) for piece in pieces]
    space = first.space
    del first
    pieces.clear()
    blocks = {name: concatenate([held.pop(name) for held in waiting]) for name in space.names}
    return Rows(space, blocks, index, aux)


def _passes_batches(step: Step) -> bool:
    """Whether a step may be taken batch by batch: an inverse of whole rows wants all at once."""
    return isinstance(step, LinearMap) or step.blockwise


def pass_in_slabs(steps: Sequence[Step], rows: Rows, slab: int) -> Rows:
    """Return whole rows after some steps of the test side.

    Blockwise inverses take as many rows of one block at once as fit ``slab`` bytes; 0: all.
    """
    for step in steps:
        if is_inverse(step) and step.blockwise:
            rows = _by_blocks(partial(taken, step), rows, slab)
        else:
            rows = taken(step, rows)
    return rows


def invert_each(inverses: Sequence[Step], rows: Rows, slab: int) -> list[Rows]:
    """Return rows after each of several inverses that share their work, as `pass_in_slabs` does."""
    first = inverses[0]
    assert isinstance(first, SharingInverse)
    several = [step for step in inverses if is_inverse(step)]
    if not first.blockwise:
        return first.apply_each(rows, several)
    done: list[dict[str, Block]] = [{} for _ in inverses]
    for name in rows.space.names:
        parts = [first.apply_each(part, several) for part in _slabs(rows.select([name]), slab)]
        for blocks, found in zip(done, zip(*parts, strict=True), strict=True):
            blocks[name] = concatenate([some.blocks[name] for some in found])
    return [Rows(rows.space, blocks, rows.index, rows.aux) for blocks in done]


def _slabs(part: Rows, slab: int) -> list[Rows]:
    """Return rows of one block, as many at a time as fit the slab; 0: all."""
    size = rows_in(slab, part) if slab else max(1, len(part))
    return [part.take(slice(k, k + size)) for k in range(0, max(1, len(part)), size)]


def _by_blocks(act: Callable[[Rows], Rows], rows: Rows, slab: int) -> Rows:
    """Return rows after a blockwise inverse, as many of one block at once as fit the slab."""
    done: dict[str, Block] = {}
    for name in rows.space.names:
        parts = _slabs(rows.select([name]), slab)
        done[name] = concatenate([act(part).blocks[name] for part in parts])
    return Rows(rows.space, done, rows.index, rows.aux)
