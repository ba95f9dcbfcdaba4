"""Columns: the train rows in the order of their distance from a test row, a few columns at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import Side, limit_now

WORK = 64
"""Bytes for each train row and column while a column is sorted and its game is solved."""
PIECE = 2**19
"""Pairs that are sorted at once where memory allows more: as many as caches hold."""
PLACE = 0xFFFFFFFF
"""The bits of a key that hold the place of a train row."""


@frozen(eq=False)
class Column:
    """Train rows as some test rows see them, from the nearest to the farthest.

    Args:
        labels: Of the train rows, ``[C, n]``.
        distances: Of the train rows, float64, ``[C, n]``.
        label: Of each test row, ``[C, 1]``.
    """

    labels: Tensor
    distances: Tensor
    label: Tensor


def solve_columns(
    game: Callable[[Column], Tensor], distances: Tensor, train: Side, test: Side
) -> Tensor:
    """Return the values of a game among the train rows, one game for each test row, ``[n, C]``.

    Args:
        game: Values of some columns, float64 ``[C, n]``, from the nearest row to the farthest.
        distances: ``[n, C]``. Two that are equal in float32 are tied, and the row that comes first
            in the train set is the nearer one.
        train: All train rows.
        test: The test rows.
    """
    labels, answers = train.aux["label"], test.aux["label"]
    place = train.index.argsort()
    moved = bool((train.index[1:] < train.index[:-1]).any())
    if moved:
        distances, labels = distances[place], labels[place]
    values = torch.empty_like(distances)
    for part in column_parts(distances):
        seen = distances[:, part].T.contiguous()
        order = nearest_first(seen)
        column = Column(labels[order], seen.gather(1, order).double(), answers[part].unsqueeze(1))
        found = game(column).to(values.dtype)
        values[:, part] = seen.scatter_(1, order, found).T
    if not moved:
        return values
    return torch.empty_like(values).index_copy_(0, place, values)


def guess(train: Side) -> float:
    """Return the chance that a guess among the labels of the train rows is right."""
    return 1 / len(set(train.aux["label"].tolist()))


def column_parts(distances: Tensor) -> list[slice]:
    """Return ranges of columns of which each keeps within the memory for intermediates."""
    rows, columns = distances.shape
    step = max(1, min(PIECE, limit_now() // WORK) // max(1, rows))
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
