"""The largest or smallest rows of each column, in one pass and without sorting everything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Extreme(NamedTuple):
    """The ids of the extreme train examples and their values, the most extreme first."""

    ids: tuple[int | str, ...] | np.ndarray[Any, Any]  # k of them, or [k, m]
    values: Tensor  # [k] or [k, m]


def extreme_rows(
    pieces: Iterable[tuple[int, Tensor]], k: int, *, largest: bool
) -> tuple[Tensor, Tensor]:
    """Return the positions and values of the k extreme rows of each column, both ``[k, m]``.

    Keeps k candidates per column and merges one piece at a time: O(n m) comparisons and memory for
    one piece. Equal values keep the order of rows, whatever the size of the pieces.

    Args:
        pieces: (first row, values ``[B, m]``) in order of rows.
        k: Rows to keep; fewer are returned when there are fewer.
        largest: Whether to keep the largest or the smallest.
    """
    kept: tuple[Tensor, Tensor] | None = None
    for start, piece in pieces:
        found = _best_of(piece, k, largest=largest)
        positions, values = found + start, piece.gather(0, found)
        if kept is not None:
            positions = torch.cat([kept[0], positions])
            values = torch.cat([kept[1], values])
            found = _best_of(values, k, largest=largest)
            positions, values = positions.gather(0, found), values.gather(0, found)
        kept = positions, values
    if kept is None:
        empty = torch.zeros(0, 0)
        return empty.long(), empty
    return kept


def _best_of(values: Tensor, k: int, *, largest: bool) -> Tensor:
    """Return the rows ``[k, m]`` of the k best values of each column; ties by order of rows."""
    keys = values if largest else -values
    rows, columns = keys.shape
    if rows > k:
        # topk breaks ties as it likes, so it only gives the threshold; ties are taken in order
        threshold = keys.topk(k, dim=0, sorted=True).values[-1]
        above = keys > threshold
        level = keys == threshold
        wanted = k - above.sum(0)
        chosen = above | (level & (level.cumsum(0) <= wanted))
        candidates = chosen.T.nonzero()[:, 1].reshape(columns, k).T
    else:
        candidates = torch.arange(rows, device=keys.device)[:, None].expand(rows, columns)
    order = keys.gather(0, candidates).sort(dim=0, descending=True, stable=True).indices
    return candidates.gather(0, order)
