"""Random matrices that are drawn a tile of columns at a time, multiplied, and forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from attrs import frozen
from torch import Tensor

from dattri_parts.projectors.entries import SPAN

TILE_BYTES = 2**23
"""Of the float32 columns that are drawn at once; bounds the memory, never the numbers."""


Columns = Callable[[int, int, torch.device | None], Tensor]
"""``columns(start, stop, device)`` writes ``M[:, start:stop]`` down, ``[K, stop-start]``: drawn by
torch on a device, or by NumPy on the host where the device is None."""


@frozen(eq=False)
class TiledKernel:
    """A `Kernel` that multiplies with its matrix, a tile at a time.

    Args:
        rows: K.
        scale: P = scale M.
        columns: Of M.
        host: Whether NumPy draws the columns on the host, whatever the device of the rows.
    """

    rows: int
    scale: float
    columns: Columns
    host: bool

    def add(self, values: Tensor, start: int, out: Tensor) -> None:
        """Add ``M[:, start:start+m] v`` for every row v to ``out``."""
        for first, last in self._tiles(start, start + values.shape[1]):
            part = values[:, first - start : last - start]
            out.addmm_(part.to(out.dtype), self._tile(first, last, out).mT)

    def adjoint(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]^T k`` for every row k."""
        raised = keys.new_empty(len(keys), stop - start)
        for first, last in self._tiles(start, stop):
            raised[:, first - start : last - start] = keys @ self._tile(first, last, keys)
        return raised

    def matrix(self, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]``."""
        return self.columns(start, stop, None).double()

    def _tile(self, first: int, last: int, like: Tensor) -> Tensor:
        return self.columns(first, last, None if self.host else like.device).to(like)

    def _tiles(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of columns that end at multiples of a span, so that no draw is in two."""
        step = SPAN * max(1, TILE_BYTES // (4 * self.rows * SPAN))
        first = start
        while first < stop:
            last = min(first - first % SPAN + step, stop)
            yield first, last
            first = last
