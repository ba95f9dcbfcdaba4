"""The one double loop: checkpoints, query groups, and one pass over the train set for each.

A run gives one or more *readings* of the same pass: the scores; or those of every damping of a
sweep, those that go through each block, or those of each checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from attrs import Factory, evolve, frozen
from torch import Tensor

from dattri_core import answers, assemble
from dattri_core.batch import Batch, move
from dattri_core.blocks import Block
from dattri_core.capabilities import BilinearScorer
from dattri_core.checkpoint import Checkpoint
from dattri_core.errors import SpecError, StoreError
from dattri_core.halving import halving
from dattri_core.making import Variants, make_branches
from dattri_core.measures import (
    Known,
    Measures,
    join_sides,
    needs_inverse,
    needs_leverages,
    take_side,
)
from dattri_core.memory import give_back
from dattri_core.pairing import WHOLE, Paired, pair_batch, require_finite
from dattri_core.plans import Plan
from dattri_core.processes import anywhere, processes_now
from dattri_core.projected import require_complete
from dattri_core.protocols import Damping, Fold, FoldState, Scored, Scorer, Side, Snapshot
from dattri_core.queries import Branch, require_finite_queries
from dattri_core.routes import shared_steps
from dattri_core.rows import Rows
from dattri_core.shelf import Shelf
from dattri_core.snapshot import Fitted
from dattri_core.stream import Examples
from dattri_core.tiles import Tiles, shards

By = Literal["block", "checkpoint"]
Fit = Callable[[Checkpoint], Fitted]
Whole = Callable[[int, int, int], None]
Report = Callable[[Fitted, Sequence[Branch], int], None]
DIAGONAL = 8
"""Rows that self-influence pairs at once: the square of it is formed, only its diagonal is kept."""
ADDITIVE = 1e-3
"""Largest difference, relative to the scores, of the sum over blocks where a scorer is additive."""


@frozen(eq=False)
class Run:
    """All that a run of the loop needs besides the fitted checkpoints.

    Args:
        checkpoints: In their own order; ``fold.order`` says in which they are taken.
        scorer: Pairs rows.
        fold: Reduces checkpoints.
        train: The train set.
        test: The test set.
        plan: Route, batch sizes, query groups and shards.
        dampings: For each variant of the test side, the damping of each step where it differs from
            the one that was fitted.
        by: What the scores are told apart by, besides variants.
        blocks: Names of the blocks, where they are told apart by block.
        summed: Whether the one column is the sum over the test set.
        shelf: Where queries wait that are kept on disk.
    """

    checkpoints: tuple[Checkpoint, ...]
    scorer: Scorer
    fold: Fold
    train: Examples
    test: Examples
    plan: Plan
    dampings: tuple[tuple[Damping | None, ...], ...]
    by: By | None = None
    blocks: tuple[str, ...] = ()
    summed: bool = False
    shelf: Shelf = Factory(Shelf)

    @property
    def shard(self) -> int:
        """Return how many train rows a tile holds."""
        column = self.scorer.locality == "column"
        return self.plan.n_train if column else self.plan.shard

    def variants(self, fitted: Fitted) -> Variants:
        """Return the test sides at a checkpoint."""
        split = self.plan.route.split
        base = evolve(fitted.chain, split=split)
        return Variants(
            base,
            len(self.dampings),
            lambda k: base.with_damping(self.dampings[k]) if any(self.dampings[k]) else base,
            shared_steps(fitted.outline.steps, split=split),
        )

    def columns(self, group: int) -> range:
        """Return the columns of a query group."""
        first = group * self.plan.query_group
        return range(first, min(first + self.plan.query_group, self.plan.n_test))


def fold_tiles(
    run: Run,
    fit: Fit,
    tiles: Tiles,
    advance: Callable[[int], None],
    report: Report,
    span: tuple[int, int] | None = None,
    whole: Whole | None = None,
) -> None:
    """Fold every checkpoint into every tile; tiles that hold a checkpoint already are passed over.

    Args:
        run: What is computed.
        fit: Gives a fitted checkpoint; one is alive at a time.
        tiles: Where the states are kept.
        advance: Called with the number of train examples scored.
        report: Called with each fitted checkpoint after its inverse Hessians were applied.
        span: First train row, and the one after the last; default all.
        whole: Called with query group, first train row and the one after the last as soon as a
            tile holds every checkpoint.
    """
    first, last = span or (0, len(run.train))
    ordered = run.checkpoints if run.fold.order == "forward" else run.checkpoints[::-1]
    for done, checkpoint in enumerate(ordered):
        known = Known(len(run.train)) if needs_inverse(run.scorer) else None
        for group in range(run.plan.groups):
            waiting = [
                (first + start, first + stop)
                for start, stop in shards(last - first, run.shard)
                if tiles.done(group, first + start) <= done
            ]
            advance(last - first - sum(stop - start for start, stop in waiting))
            if not anywhere(bool(waiting)):
                continue
            fitted = fit(checkpoint)
            give_back()  # what the fit, and the group before, have freed
            branches = make_branches(
                run.variants(fitted),
                run.scorer,
                run.test,
                run.columns(group),
                run.plan,
                fitted.device,
                checkpoint.name,
                run.shelf,
                summed=run.summed,
            )
            report(fitted, branches, group)
            if known is not None and not known.complete and needs_leverages(run.scorer):
                known.foretell(_leverages(branches))
            for start, stop in waiting:
                scored = score_tile(run, fitted, branches, start, stop, advance, known)
                _require_untouched(tiles, group, start, done)
                states = _updated(run, tiles.get(group, start), scored, checkpoint)
                tiles.put(group, start, done + 1, states)
                if whole is not None and done + 1 == len(ordered):
                    whole(group, start, stop)
            # Or they are there while those of the next group, and the next fit, are made.
            del branches, fitted


def _leverages(branches: Sequence[Branch]) -> dict[int, Tensor | None]:
    chains = {v: chain for branch in branches for v, chain in branch.chains.items()}
    return {v: chain.self_influence() for v, chain in chains.items()}


def _require_untouched(tiles: Tiles, group: int, start: int, done: int) -> None:
    """Raise unless a tile still holds the checkpoints before this one, so that none counts twice.

    The lock of a run's folder keeps others out; this holds where a file system has no locks.
    """
    held = tiles.done(group, start)
    if held != done:
        raise StoreError(
            f"attribute: the tile of train rows from {start} on, query group {group}, held {done} "
            f"checkpoints and now holds {held}: another process writes these scores; stop one of "
            "the two and run again"
        )


def finished(
    run: Run, tiles: Tiles, span: tuple[int, int] | None = None
) -> Iterator[tuple[slice, slice, list[Tensor]]]:
    """Yield (train range, test range, scores by reading) of each tile, and forget the tile.

    Train ranges count from the first row of the span, which is that of `fold_tiles`.
    """
    first, last = span or (0, len(run.train))
    for group in range(run.plan.groups):
        columns = run.columns(group)
        for start, stop in shards(last - first, run.shard):
            values = finish_tile(run, tiles, group, first + start, first + stop)
            yield slice(start, stop), slice(columns.start, columns.stop), values


def finish_tile(run: Run, tiles: Tiles, group: int, start: int, stop: int) -> list[Tensor]:
    """Return the scores of a tile by reading, and forget the tile."""
    held = tiles.get(group, start)
    assert held is not None
    values = [run.fold.finish(state) for state in _apart(held)]
    shape = stop - start, len(run.columns(group))
    for found in values:
        answers.require_shape(f"fold {assemble.name_of(run.fold)!r}: finish", found, shape)
    tiles.drop(group, start)
    return values


# --- readings -------------------------------------------------------------------------------------
def _updated(
    run: Run, held: FoldState | None, scored: Sequence[Scored], checkpoint: Checkpoint
) -> FoldState:
    """Return a tile's state after one more checkpoint: the fold's, once for each reading."""
    if run.by == "checkpoint":
        (one,) = scored
        nothing = Scored(torch.zeros_like(one.values), one.weight)
        scored = [one if c is checkpoint else nothing for c in run.checkpoints]
    before = [None] * len(scored) if held is None else _apart(held)
    snapshot = snapshot_of(checkpoint)
    return _together(
        [answers.update(run.fold, s, one, snapshot) for s, one in zip(before, scored, strict=True)]
    )


def _together(states: Sequence[FoldState]) -> FoldState:
    return {f"{at}.{key}": value for at, state in enumerate(states) for key, value in state.items()}


def _apart(state: FoldState) -> list[FoldState]:
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        at, _, key = name.partition(".")
        states.setdefault(int(at), {})[key] = value
    return [states[at] for at in sorted(states)]


# --- tiles ----------------------------------------------------------------------------------------
def score_tile(
    run: Run,
    fitted: Fitted,
    branches: Sequence[Branch],
    start: int,
    stop: int,
    advance: Callable[[int], None],
    known: Known | None,
) -> list[Scored]:
    """Return the scores of the train rows ``start:stop`` for each reading, on the CPU."""
    column = run.scorer.locality == "column"
    parts: list[list[Paired]] = []
    kept: list[list[Scored]] = []

    def work(index: Tensor, batch: Batch) -> None:
        paired = pair_batch(
            fitted.chain.source,
            branches,
            run.scorer,
            index,
            batch,
            "train",
            by_block=run.by == "block",
            known=known,
        )
        if column:
            parts.append(paired)
        else:
            kept.append(_read(run, paired, fitted.checkpoint))
        advance(len(index))

    for index, batch in run.train.batches(run.plan.train_batch, start, stop):
        halving(work, index, batch, "train rows")
    if column:
        whole = [_join_paired(of_variant) for of_variant in zip(*parts, strict=True)]
        parts.clear()
        kept.append(_read(run, whole, fitted.checkpoint))
    return [_join_scored(of_reading) for of_reading in zip(*kept, strict=True)]


def _read(run: Run, paired: Sequence[Paired], checkpoint: Checkpoint) -> list[Scored]:
    """Return the scores of some train rows for each reading, on the CPU."""
    readings: list[Scored] = []
    for one in paired:
        scored = [
            answers.finish(run.scorer, one.totals[name], one.train, one.test)
            for name in (run.blocks or (WHOLE,))
        ]
        if run.by == "block":
            _require_additive(run.scorer, one, scored)
        readings += scored
    for scored_one in readings:
        require_finite(scored_one.values, paired[0].train.index, checkpoint)
    return [
        Scored(s.values.to("cpu"), None if s.weight is None else s.weight.to("cpu"))
        for s in readings
    ]


def _require_additive(scorer: Scorer, paired: Paired, parts: Sequence[Scored]) -> None:
    """Raise unless the scores of the blocks add up to the score of all blocks together."""
    totals = list(paired.totals.values())
    whole = answers.finish(scorer, torch.stack(totals).sum(0), paired.train, paired.test).values
    gap = (torch.stack([part.values for part in parts]).sum(0) - whole).abs().max()
    size = max(float(whole.abs().max()), *(float(part.values.abs().max()) for part in parts))
    if float(gap) > ADDITIVE * size:
        raise SpecError(
            f"attribute(by='block'): the scorer {type(scorer).__name__} is not additive over "
            f"blocks: their scores differ from the whole by {float(gap):.2g}, the largest being "
            f"{size:.2g}; use 'dot' or 'cosine', or attribute(parameters=...) of one block"
        )


def _join_paired(parts: Sequence[Paired]) -> Paired:
    first = parts[0]
    totals = {name: torch.cat([part.totals[name] for part in parts]) for name in first.totals}
    return Paired(totals, join_sides([part.train for part in parts]), first.test)


def _join_scored(parts: Sequence[Scored]) -> Scored:
    weights = [part.weight for part in parts if part.weight is not None]
    return Scored(
        torch.cat([part.values for part in parts]), torch.cat(weights) if weights else None
    )


# --- self-influence -------------------------------------------------------------------------------
def self_influence(
    fit: Fit,
    checkpoints: tuple[Checkpoint, ...],
    scorer: Scorer,
    fold: Fold,
    train: Examples,
    batch: int,
    advance: Callable[[int], None],
) -> Tensor:
    """Return the score of every train example for its own train loss, ``[n_train]``, in O(n)."""
    ordered = checkpoints if fold.order == "forward" else checkpoints[::-1]
    processes, count = processes_now(), len(train)
    first, last = (0, count) if processes is None else processes.part(count)
    state: FoldState | None = None
    for checkpoint in ordered:
        fitted = fit(checkpoint)
        give_back()
        parts = _known_diagonal(fitted, scorer, first, last)
        if parts:
            advance(last - first)
        for index, examples in () if parts else train.batches(batch, first, last):
            halving(
                lambda i, b, fitted=fitted, parts=parts: parts.append(  # type: ignore[misc]
                    _diagonal(fitted, scorer, i, b)
                ),
                index,
                examples,
                "self-influence",
            )
            advance(len(index))
        if parts:
            state = answers.update(fold, state, _join_scored(parts), snapshot_of(checkpoint))
        del fitted  # or it is there while the next checkpoint is fitted
    found = {} if state is None else {WHOLE: fold.finish(state)[:, 0]}
    if processes is not None:
        found = processes.joined(found, count, torch.device("cpu"))
    return found[WHOLE]


def _known_diagonal(fitted: Fitted, scorer: Scorer, first: int, last: int) -> list[Scored]:
    """Return the scores of train rows ``first:last`` where no row is read; else nothing.

    The scorer is to read inner products alone, and the inverse to know those of the rows.
    """
    bilinear = isinstance(scorer, BilinearScorer) and scorer.bilinear
    if not bilinear or not scorer.needs <= {"self-influence"}:
        return []
    known = fitted.chain.self_influence()
    if known is None:
        return []
    known = known.to("cpu", fitted.dtype)
    found: list[Scored] = []
    for rows in torch.split(torch.arange(first, last), DIAGONAL):
        own = known[rows]
        side = Side(rows, {}, None, own)
        scored = scorer.finish(own.diag(), side, side)
        require_finite(scored.values, rows, fitted.checkpoint)
        found.append(Scored(scored.values.diagonal().unsqueeze(1), scored.weight))
    return found


def _diagonal(fitted: Fitted, scorer: Scorer, index: Tensor, batch: Batch) -> Scored:
    """Return the scores of rows for themselves; a block at a time, where all steps act by blocks.

    A scorer pairs all rows that it is given, so it is given a few at a time, and the diagonal of
    what it makes of them is kept.
    """
    chain, source = fitted.chain, fitted.chain.source
    parts = [slice(start, start + DIAGONAL) for start in range(0, len(index), DIAGONAL)]
    totals: list[list[Tensor]] = [[] for _ in parts]
    train, test = Measures(scorer.needs), Measures(scorer.needs)
    names: list[str] = []
    waiting: dict[str, Block] = {}
    streams = chain.blockwise and chain.test_blockwise

    def meet(rows: Rows) -> None:
        ahead, behind = chain.both(rows)
        require_finite_queries(behind.blocks, index, fitted.checkpoint.name)
        train.add(ahead, behind)
        test.add(behind)
        for part, total in zip(parts, totals, strict=True):
            for name, block in ahead.blocks.items():
                pairs = scorer.pair(block.take(part), behind.blocks[name].take(part))
                total[:] = [total[0] + pairs] if total else [pairs]

    def sink(name: str, block: Block) -> None:
        names.append(name)
        if streams:
            meet(Rows(source.space.select([name]), {name: block}, index))
        else:
            waiting[name] = block

    aux = source.stream(move(batch, fitted.device), "train", sink)
    require_complete(source.space, names)
    if waiting:
        meet(Rows(source.space, waiting, index))
    sides = train.side(index, aux), test.side(index, aux)
    found = []
    for part, total in zip(parts, totals, strict=True):
        ahead, behind = (take_side(side, part) for side in sides)
        scored = answers.finish(scorer, total[0], ahead, behind)
        require_finite(scored.values, ahead.index, fitted.checkpoint)
        weight = None if scored.weight is None else scored.weight.cpu()
        found.append(Scored(scored.values.diagonal().unsqueeze(1).cpu(), weight))
    return _join_scored(found)


def snapshot_of(checkpoint: Checkpoint) -> Snapshot:
    """Return what a fold may know of a checkpoint."""
    return Snapshot(
        checkpoint.position, checkpoint.count, checkpoint.name, checkpoint.learning_rate
    )
