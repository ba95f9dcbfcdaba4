"""The matrix of the block count-sketch: signed cyclic shifts side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from attrs import frozen
from torch import Tensor

from dattri_parts.projectors.entries import entries, random_integers

SIGNS_AT_ONCE = 2**20
"""Signs that are drawn at once; bounds the memory, never the numbers."""
NUMBERS_IN_CACHE = 2**16
"""Numbers of one operation on the CPU, so that the sketch of its rows stays in the cache."""
NUMBERS_SERIAL = 2**15
"""The same where torch has several threads: it takes so many on one of them, and to wake the others
for each of thousands of short operations would cost more than they save. Each thread of ours takes
rows of its own instead."""
BLOCKS_IN_PARALLEL = 64
"""Blocks of fewer are not worth a thread."""


def shifted_columns(
    key: int, rows: int, nonzeros: int, start: int, stop: int, device: torch.device | None
) -> Tensor:
    """Return ``M[:, start:stop]`` written down in float32, ``[K, stop-start]``.

    With L = K / s, column d = j L + i has, for each t below s, the sign (t, d) in row
    t L + (i + shift) mod L, where shift is integer (t, j) below L.
    """
    length = rows // nonzeros
    signs = entries(key, (0, nonzeros), (start, stop), "signs", device)
    coordinate = torch.arange(start, stop, dtype=torch.int64, device=signs.device)
    first = start // length
    targets = []
    for t in range(nonzeros):
        found = random_integers(key, t, first, -(-stop // length), length, device)
        shifts = torch.as_tensor(found)[coordinate // length - first]
        targets.append(t * length + (coordinate + shifts) % length)
    matrix = signs.new_zeros(rows, stop - start)
    return matrix.scatter_(0, torch.stack(targets), signs)


@frozen(eq=False)
class ShiftedKernel:
    """A `Kernel` that adds blocks of coordinates to windows of the sketch, by torch on any device.

    Args:
        key: Of signs and shifts.
        rows: K.
        nonzeros: s of each column.
    """

    key: int
    rows: int
    nonzeros: int

    @property
    def scale(self) -> float:
        """Return 1/sqrt(s)."""
        return 1 / math.sqrt(self.nonzeros)

    @property
    def length(self) -> int:
        """Return the numbers of one of the s sketches."""
        return self.rows // self.nonzeros

    def add(self, values: Tensor, start: int, out: Tensor) -> None:
        """Add ``M[:, start:start+m] v`` for every row v to ``out``."""
        for t in range(self.nonzeros):
            # Twice as long, so that a turned block is one window; folded at the end.
            unrolled = out.new_zeros(len(out), 2 * self.length)

            def take(block: Tensor, window: Tensor, sign: Tensor) -> None:
                window.addcmul_(block, sign)

            self._each(take, t, values, start, unrolled)
            folded = unrolled[:, : self.length] + unrolled[:, self.length :]
            out.narrow(1, t * self.length, self.length).add_(folded)

    def adjoint(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]^T k`` for every row k."""
        raised = keys.new_zeros(len(keys), stop - start)
        for t in range(self.nonzeros):
            once = keys.narrow(1, t * self.length, self.length)
            unrolled = torch.cat([once, once], 1)

            def give(block: Tensor, window: Tensor, sign: Tensor) -> None:
                block.addcmul_(window, sign)

            self._each(give, t, raised, start, unrolled)
        return raised

    def matrix(self, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]``."""
        return shifted_columns(self.key, self.rows, self.nonzeros, start, stop, None).double()

    def _each(
        self,
        work: Callable[[Tensor, Tensor, Tensor], None],
        t: int,
        values: Tensor,
        start: int,
        unrolled: Tensor,
    ) -> None:
        """Do ``work(block, its window, its signs)`` for all blocks, in place.

        Args:
            work: Takes some rows of a block ``[b, m]``, as many of the sketch, and signs ``[m]``.
            t: Which of the s sketches.
            values: ``[B, m]``.
            start: Coordinate of their first column.
            unrolled: Two turns of a sketch, ``[B, 2 L]``.
        """
        length, stop = self.length, start + values.shape[1]
        rows, workers = max(1, len(values)), 1
        drawing: torch.device | None = values.device
        if values.device.type == "cpu":  # NumPy draws there, which wakes no threads either
            workers = torch.get_num_threads()
            numbers = NUMBERS_IN_CACHE if workers == 1 else NUMBERS_SERIAL
            rows, drawing = min(max(1, numbers // length), -(-rows // workers)), None
        step = length * max(1, SIGNS_AT_ONCE // length)
        begins = [start, *range(start - start % length + step, stop, step)]
        cuts = list(zip(begins, [*begins[1:], stop], strict=True))

        def draw(cut: tuple[int, int]) -> _Tile:
            return self._tile(t, *cut, drawing, unrolled.dtype)

        def some_rows(tile: _Tile, part: Tensor, turned: Tensor) -> None:
            here = part.narrow(1, tile.first - start, sum(tile.sizes)).to(unrolled.dtype)
            blocks = torch.split(here, tile.sizes, 1)
            for block, at, size, sign in zip(
                blocks, tile.windows, tile.sizes, tile.signs, strict=True
            ):
                work(block, turned.narrow(1, at, size), sign)

        parts = list(zip(torch.split(values, rows), torch.split(unrolled, rows), strict=True))
        if workers == 1 or len(parts) == 1 or stop - start < BLOCKS_IN_PARALLEL * length:
            for cut in cuts:
                tile = draw(cut)
                for part, turned in parts:
                    some_rows(tile, part, turned)
            return
        with ThreadPoolExecutor(workers) as pool:
            drawn = pool.submit(draw, cuts[0])
            for following in [*cuts[1:], None]:
                tile = drawn.result()
                if following is not None:  # while the rows of this one are taken
                    drawn = pool.submit(draw, following)
                for done in [pool.submit(some_rows, tile, *pair) for pair in parts]:
                    done.result()

    def _tile(
        self, t: int, first: int, last: int, device: torch.device | None, dtype: torch.dtype
    ) -> _Tile:
        """Return the places and signs of the coordinates ``first:last``."""
        length = self.length
        edges = [first, *range(first - first % length + length, last, length), last]
        sizes = [end - begin for begin, end in pairwise(edges)]
        drawn = entries(self.key, (t, t + 1), (first, last), "signs", device)[0]
        # NumPy draws the shifts: they are needed on the host, and no device waits for them.
        shifts = random_integers(
            self.key, t, first // length, -(-last // length), length, None
        ).tolist()
        windows = [shift + edge % length for shift, edge in zip(shifts, edges, strict=False)]
        return _Tile(first, sizes, windows, torch.split(drawn.to(dtype), sizes))


@frozen(eq=False)
class _Tile:
    """Some coordinates: the sizes of their blocks, where each begins in the sketch, and signs."""

    first: int
    sizes: list[int]
    windows: list[int]
    signs: Sequence[Tensor]
