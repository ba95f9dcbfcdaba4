"""The matrix of the randomised Hadamard transform, and the fast transform."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor

from dattri_parts.projectors.entries import entries

NUMBERS_AT_ONCE = 2**20
"""Numbers that are transformed at once; bounds the memory, never the numbers."""
FACTOR = 64
"""Side of the Hadamard matrices that are multiplied with; larger ones are Kronecker products."""


def hadamard(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return H of a power of two: entry (k, i) is -1 to the number of bits that k and i share."""
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def hadamard_columns(
    key: int, rows: int, start: int, stop: int, device: torch.device | None
) -> Tensor:
    """Return ``M[:, start:stop]`` written down in float32, ``[K, stop-start]``.

    Entry (k, d) of block j = d // K with i = d mod K is r(j K + k) H(k, i) s(d), where s and r are
    the signs of the rows 0 and 1.
    """
    first, last = start // rows, -(-stop // rows)
    signs = entries(key, (0, 2), (first * rows, last * rows), "signs", device)
    walsh = hadamard(rows, dtype=signs.dtype, device=signs.device)
    coordinate = torch.arange(start, stop, device=signs.device) - first * rows
    after = signs[1].reshape(last - first, rows)[coordinate // rows]  # [stop-start, K]
    return after.mT * walsh[:, coordinate % rows] * signs[0, coordinate]


@frozen(eq=False)
class HadamardKernel:
    """A `Kernel` of fast Hadamard transforms of blocks, by torch on any device.

    Args:
        key: Of the signs.
        rows: K, a power of two.
    """

    key: int
    rows: int

    @property
    def scale(self) -> float:
        """Return 1/sqrt(K)."""
        return 1 / math.sqrt(self.rows)

    def add(self, values: Tensor, start: int, out: Tensor) -> None:
        """Add ``M[:, start:start+m] v`` for every row v to ``out``."""
        batch = len(values)
        for first, last in self._tiles(start, start + values.shape[1], batch):
            # Blocks are filled up with zeros at both ends of the rows.
            blocks = out.new_zeros(batch, last - first)
            begin, end = max(first, start), min(last, start + values.shape[1])
            blocks[:, begin - first : end - first] = values[:, begin - start : end - start]
            before, after = self._signs(first, last, out)
            count = (last - first) // self.rows
            turned = self._transform(blocks.mul_(before).reshape(batch, count, self.rows))
            out.add_(turned.mul_(after).sum(1))

    def adjoint(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]^T k`` for every row k."""
        batch = len(keys)
        raised = keys.new_empty(batch, stop - start)
        for first, last in self._tiles(start, stop, batch):
            before, after = self._signs(first, last, keys)
            turned = self._transform(keys.unsqueeze(1) * after)
            blocks = turned.reshape(batch, last - first).mul_(before)
            begin, end = max(first, start), min(last, stop)
            raised[:, begin - start : end - start] = blocks[:, begin - first : end - first]
        return raised

    def matrix(self, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]``."""
        return hadamard_columns(self.key, self.rows, start, stop, None).double()

    def _transform(self, blocks: Tensor) -> Tensor:
        """Return H v for every block v, ``[B, blocks, K]``; H is symmetric, and its own adjoint.

        H of K is the Kronecker product of those of its factors, one of which acts on one axis. Each
        axis in turn becomes the last one, where one large product transforms it.
        """
        factors = [FACTOR] * (int(math.log2(self.rows)) // int(math.log2(FACTOR)))
        factors += [self.rows // math.prod(factors)]
        turned, count = blocks, blocks.numel() // self.rows
        for factor in factors:
            matrix = hadamard(factor, dtype=blocks.dtype, device=blocks.device)
            turned = turned.reshape(count, factor, self.rows // factor).mT @ matrix
        return turned.reshape(blocks.shape)

    def _signs(self, first: int, last: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signs before H, ``[coordinates]``, and after it, ``[blocks, K]``."""
        drawn = entries(self.key, (0, 2), (first, last), "signs", like.device).to(like.dtype)
        return drawn[0], drawn[1].reshape(-1, self.rows)

    def _tiles(self, start: int, stop: int, batch: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of whole blocks that cover ``start`` to ``stop``."""
        step = self.rows * max(1, NUMBERS_AT_ONCE // (self.rows * max(1, batch)))
        end = -(-stop // self.rows) * self.rows
        for first in range(start - start % self.rows, end, step):
            yield first, min(first + step, end)
