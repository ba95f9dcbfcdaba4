"""The largest or smallest rows of each column, in one pass and without sorting everything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from attrs import define, field
from torch import Tensor

from dattri_core.errors import InputError


class Extreme(NamedTuple):
    """The ids of the extreme train examples and their values, the most extreme first."""

    ids: tuple[int | str, ...] | np.ndarray[Any, Any]  # k of them, or [k, m]
    values: Tensor  # [k] or [k, m]


class Extremes(NamedTuple):
    """The most helpful and the most harmful train examples of every test example.

    `top` and `bottom` are what `Scores.top` and `Scores.bottom` return for all test examples.
    """

    top: Extreme
    bottom: Extreme
    test_ids: Sequence[int | str]
    provenance: Mapping[str, Any]


@define(eq=False)
class ExtremeRows:
    """The k extreme rows of each column among those seen so far: k m numbers and positions.

    Equal values keep the order of rows, whatever the size of the pieces.

    Args:
        k: Rows to keep; there are fewer while fewer were seen.
        largest: Whether to keep the largest or the smallest.
    """

    k: int
    largest: bool
    positions: Tensor = field(factory=lambda: torch.zeros(0, 0, dtype=torch.long), init=False)
    values: Tensor = field(factory=lambda: torch.zeros(0, 0), init=False)

    def add(self, start: int, piece: Tensor) -> None:
        """Take further rows in, values ``[B, m]`` of the rows from ``start`` on, in order."""
        found = _best_of(piece, self.k, largest=self.largest)
        self._keep(found + start, piece.gather(0, found))

    @staticmethod
    def joined(parts: Sequence[ExtremeRows]) -> ExtremeRows:
        """Return the extremes of the rows that several have seen, part after part."""
        whole = ExtremeRows(parts[0].k, parts[0].largest)
        for part in parts:
            if len(part.positions):
                whole._keep(part.positions, part.values)
        return whole

    def _keep(self, positions: Tensor, values: Tensor) -> None:
        if len(self.positions):
            positions = torch.cat([self.positions, positions])
            values = torch.cat([self.values, values])
            found = _best_of(values, self.k, largest=self.largest)
            positions, values = positions.gather(0, found), values.gather(0, found)
        self.positions, self.values = positions, values


def checked_count(k: Any, what: str) -> int:
    """Return k as an int.

    Raises:
        InputError: It is no whole number of at least 1.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InputError(f"{what}: k is {k!r}; give a whole number of at least 1")
    return int(k)


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
    kept = ExtremeRows(k, largest)
    for start, piece in pieces:
        kept.add(start, piece)
    return kept.positions, kept.values


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
