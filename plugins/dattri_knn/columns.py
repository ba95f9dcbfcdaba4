"""Columns: the train rows in the order of their distance from a test row, a few columns at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import Side, limit_now
from dattri_knn.distances import Distance, whole

WORK = 64
"""Bytes for each train row and column while a column is sorted and its game is solved."""
PIECE = 2**20
"""Pairs that a processor sorts at once where memory allows more: as many as its caches hold."""
LINE = 16
"""Columns that share a line of the cache: pieces are multiples of it, where they hold as many."""
SERIAL = 2**18
"""Fewer pairs are not worth a thread."""
PLACE = 0xFFFFFFFF
"""The bits of a key that hold the place of a train row."""


@frozen(eq=False)
class Column:
    """Train rows as some test rows see them, from the nearest to the farthest.

    Args:
        labels: Of the train rows, ``[C, n]``.
        label: Of each test row, ``[C, 1]``.
    """

    labels: Tensor
    label: Tensor
    _seen: Tensor
    _order: Tensor

    @property
    def distances(self) -> Tensor:
        """Return those of the train rows, float64, ``[C, n]``."""
        return self._seen.gather(1, self._order).double()


def solve_columns(
    game: Callable[[Column], Tensor], total: Tensor, train: Side, test: Side, distance: Distance
) -> Tensor:
    """Return the values of a game among the train rows, one game for each test row, ``[n, C]``.

    Two distances that are equal in float32 are tied, and the row that comes first in the train set
    is the nearer one.

    Args:
        game: Values of some columns, float64 ``[C, n]``, from the nearest row to the farthest.
        total: What added up over blocks, ``[n, C]``.
        train: All train rows.
        test: The test rows.
        distance: Which distance that is the sum for.
    """
    labels, answers = train.aux["label"], test.aux["label"].unsqueeze(1)
    moved = bool((train.index[1:] < train.index[:-1]).any())
    place = train.index.argsort() if moved else slice(None)
    labels = labels[place]
    values = torch.empty_like(total)

    def solve(part: slice) -> None:
        seen = distances_from(total, train, test, distance, part)[:, place]
        order = nearest_first(seen)
        found = game(Column(labels[order], answers[part], seen, order))
        values[place, part] = seen.scatter_(1, order, found.to(seen.dtype)).T

    workers = torch.get_num_threads()
    if total.device.type != "cpu" or total.numel() < SERIAL:
        workers = 1
    parts = column_parts(total, workers)
    if workers == 1:
        for part in parts:
            solve(part)
        return values
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(solve, parts))
    return values


def distances_from(
    total: Tensor, train: Side, test: Side, distance: Distance, part: slice
) -> Tensor:
    """Return the distances of some test rows, ``[C, n]``, in memory of their own."""
    sums = total[:, part].T.clone(memory_format=torch.contiguous_format)
    scale = None
    if train.norm is not None and test.norm is not None:
        scale = test.norm[part].unsqueeze(1) * train.norm
    return whole(sums, scale, distance)


def guess(train: Side) -> float:
    """Return the chance that a guess among the labels of the train rows is right."""
    return 1 / len(set(train.aux["label"].tolist()))


def column_parts(pairs: Tensor, workers: int = 1) -> list[slice]:
    """Return ranges of columns, of which those at work keep within the memory for intermediates.

    Args:
        pairs: ``[n, C]``.
        workers: Ranges that are at work at a time.
    """
    rows, columns = pairs.shape
    pairs_at_once = limit_now() // WORK // workers
    if pairs.device.type == "cpu":
        pairs_at_once = min(PIECE, pairs_at_once)
    step = max(1, pairs_at_once // max(1, rows))
    step = min(step, -(-columns // workers))
    step -= step % LINE if step > LINE else 0
    return [slice(start, start + step) for start in range(0, columns, step)]


def nearest_first(distances: Tensor) -> Tensor:
    """Return the places of the train rows by distance, ties by place, ``[C, n]``.

    Distance, in float32, and place are the halves of one integer, so that no two keys are equal and
    any sort is a stable one.
    """
    bits = (distances.float() + 0.0).view(torch.int32)  # adding zero: of the two zeros one is left
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the numbers
    keys = bits.long().bitwise_left_shift_(32)
    keys += torch.arange(distances.shape[1], device=distances.device)
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)  # several times as fast as torch's
    else:
        keys = keys.sort(dim=1).values
    return keys.bitwise_and_(PLACE)
