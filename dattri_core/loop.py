"""The one double loop: checkpoints, query groups, and one pass over the train set for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dattri_core.batch import Batch
from dattri_core.checkpoint import Checkpoint
from dattri_core.halving import halving
from dattri_core.measures import join_sides
from dattri_core.memory import Plan
from dattri_core.protocols import Fold, FoldState, Scored, Scorer, Side, Snapshot
from dattri_core.snapshot import (
    Fitted,
    Queries,
    both_sides,
    make_queries,
    pair_batch,
    pair_rows,
    require_finite,
    take_queries,
)
from dattri_core.stream import Examples
from dattri_core.tiles import Tiles, shards

Fit = Callable[[Checkpoint], Fitted]
Report = Callable[[Fitted, int], None]
DIAGONAL = 8
"""Rows that self-influence pairs at once: the square of it is formed, only its diagonal is kept."""


def fold_tiles(
    fit: Fit,
    checkpoints: tuple[Checkpoint, ...],
    scorer: Scorer,
    fold: Fold,
    train: Examples,
    test: Examples,
    plan: Plan,
    tiles: Tiles,
    advance: Callable[[int], None],
    report: Report,
) -> None:
    """Fold every checkpoint into every tile; tiles that hold a checkpoint already are passed over.

    Args:
        fit: Gives a fitted checkpoint; one is alive at a time.
        checkpoints: In their own order; ``fold.order`` says in which they are taken.
        scorer: Pairs rows.
        fold: Reduces checkpoints.
        train: The train set.
        test: The test set.
        plan: Batch sizes, query groups and shards.
        tiles: Where the states are kept.
        advance: Called with the number of train examples scored.
        report: Called with each fitted checkpoint after its inverse Hessians were applied.
    """
    ordered = checkpoints if fold.order == "forward" else checkpoints[::-1]
    for done, checkpoint in enumerate(ordered):
        snapshot = snapshot_of(checkpoint)
        for group in range(plan.groups):
            first = group * plan.query_group
            waiting = [
                shard
                for shard in shards(len(train), _shard(plan, scorer))
                if tiles.done(group, shard[0]) <= done
            ]
            skipped = len(train) - sum(stop - start for start, stop in waiting)
            advance(skipped)
            if not waiting:
                continue
            fitted = fit(checkpoint)
            last = min(first + plan.query_group, len(test))
            queries = make_queries(fitted, scorer, test, first, last, plan.test_batch)
            report(fitted, group)
            for start, stop in waiting:
                scored = score_tile(fitted, scorer, queries, train, start, stop, plan, advance)
                state = fold.update(tiles.get(group, start), scored, snapshot)
                tiles.put(group, start, done + 1, state)


def finished(
    fold: Fold, scorer: Scorer, n_train: int, n_test: int, plan: Plan, tiles: Tiles
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (train range, test range, scores) of each tile, and forget the tile."""
    for group in range(plan.groups):
        first = group * plan.query_group
        columns = slice(first, min(first + plan.query_group, n_test))
        for start, stop in shards(n_train, _shard(plan, scorer)):
            state = tiles.get(group, start)
            assert state is not None
            values = fold.finish(state)
            tiles.drop(group, start)
            yield slice(start, stop), columns, values


def score_tile(
    fitted: Fitted,
    scorer: Scorer,
    queries: Queries,
    train: Examples,
    start: int,
    stop: int,
    plan: Plan,
    advance: Callable[[int], None],
) -> Scored:
    """Return the scores of the train rows ``start:stop`` for a group of queries, on the CPU."""
    values: list[Tensor] = []
    weights: list[Tensor] = []
    sides: list[Side] = []

    def keep(scored: Scored, index: Tensor) -> None:
        require_finite(scored.values, index, fitted.checkpoint)
        values.append(scored.values.to("cpu"))
        if scored.weight is not None:
            weights.append(scored.weight.to("cpu"))

    def work(index: Tensor, batch: Batch) -> None:
        total, side = pair_batch(fitted.chain, scorer, queries, index, batch, "train")
        if scorer.locality == "column":
            values.append(total)
            sides.append(side)
        else:
            keep(scorer.finish(total, side, queries.side), index)
        advance(len(index))

    for index, batch in train.batches(plan.train_batch, start, stop):
        halving(work, index, batch, "train rows")
    if scorer.locality == "column":
        whole = join_sides(sides)
        total = torch.cat(values)
        values.clear()
        keep(scorer.finish(total, whole, queries.side), whole.index)
    return Scored(torch.cat(values), torch.cat(weights) if weights else None)


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
    state: FoldState | None = None
    for checkpoint in ordered:
        fitted = fit(checkpoint)
        parts: list[Scored] = []
        for index, examples in train.batches(batch):
            halving(
                lambda i, b, fitted=fitted, parts=parts: parts.append(  # type: ignore[misc]
                    _diagonal(fitted, scorer, i, b)
                ),
                index,
                examples,
                "self-influence",
            )
            advance(len(index))
        weights = [part.weight for part in parts if part.weight is not None]
        scored = Scored(
            torch.cat([part.values for part in parts]), torch.cat(weights) if weights else None
        )
        state = fold.update(state, scored, snapshot_of(checkpoint))
    assert state is not None
    return fold.finish(state)[:, 0]


def _diagonal(fitted: Fitted, scorer: Scorer, index: Tensor, batch: Batch) -> Scored:
    rows, queries = both_sides(fitted, scorer, index, batch)
    values, weights = [], []
    for start in range(0, len(index), DIAGONAL):
        part = slice(start, start + DIAGONAL)
        total, side = pair_rows(rows.take(part), scorer, take_queries(queries, part))
        scored = scorer.finish(total, side, take_queries(queries, part).side)
        require_finite(scored.values, index[part], fitted.checkpoint)
        values.append(scored.values.diagonal().unsqueeze(1).cpu())
        if scored.weight is not None:
            weights.append(scored.weight.cpu())
    return Scored(torch.cat(values), torch.cat(weights) if weights else None)


def snapshot_of(checkpoint: Checkpoint) -> Snapshot:
    """Return what a fold may know of a checkpoint."""
    return Snapshot(
        checkpoint.position, checkpoint.count, checkpoint.name, checkpoint.learning_rate
    )


def _shard(plan: Plan, scorer: Scorer) -> int:
    return plan.n_train if scorer.locality == "column" else plan.shard
