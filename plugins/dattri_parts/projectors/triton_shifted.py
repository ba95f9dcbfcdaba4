"""The block count-sketch as one fused kernel, without atomics, tables or signs in memory.

A program owns some numbers of the sketch and reads, from every block of its range, the coordinates
that go there: neighbours in the sketch are neighbours in the row. Partial sums of ranges of blocks
are added in a fixed order, so that a result is the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from dattri_parts.projectors.shifted import ShiftedKernel

SPLITS = 128
"""Ranges of blocks, each summed by programs of its own."""
ROWS_AT_ONCE = 32
NUMBERS_AT_ONCE = 256


@triton.jit
def pick(words0, words1, words2, words3, which):
    """Return word ``which`` of four."""
    first = tl.where(which == 0, words0, words1)
    second = tl.where(which == 2, words2, words3)
    return tl.where(which < 2, first, second)


@triton.jit(do_not_specialize=["key_low", "key_high", "first_block", "lead"])
def add_shifted(
    values,
    out,
    key_low,
    key_high,
    batch,
    columns,
    rows,
    stride,
    first_block,
    lead,
    blocks,
    blocks_each,
    length,
    tiles,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Write the sums of one range of blocks to ``out[split, b, k]``; see `shifted_columns`.

    Coordinate ``lead`` of the first block is the first column of ``values [batch, columns]``.
    """
    sketch = tl.program_id(0) // tiles
    target = (tl.program_id(0) % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    low = key_low.to(tl.uint32)
    high = key_high.to(tl.uint32)
    first_block64 = first_block.to(tl.int64)
    none = tl.zeros((BLOCK_R,), tl.uint32)
    series = sketch.to(tl.uint32) + none
    row_of_values = values + b.to(tl.int64)[:, None] * stride
    total = tl.zeros((BLOCK_B, BLOCK_R), tl.float32)
    for block in range(split * blocks_each, tl.minimum(blocks, (split + 1) * blocks_each)):
        j = first_block64 + block
        counter = (j >> 2) + none.to(tl.int64)
        drawn0, drawn1, drawn2, drawn3 = tl.philox_impl(
            counter.to(tl.uint32), series, none + 2, (counter >> 32).to(tl.uint32), low, high, 10
        )
        word = pick(drawn0, drawn1, drawn2, drawn3, j & 3)
        shift = (word.to(tl.int64) * length) >> 32
        inside = target - shift
        inside = tl.where(inside < 0, inside + length, inside)
        coordinate = j * length + inside
        at = (coordinate >> 9) * 4 + ((coordinate >> 1) & 3)
        sign0, sign1, sign2, sign3 = tl.philox_impl(
            at.to(tl.uint32), series, none, (at >> 32).to(tl.uint32), low, high, 10
        )
        signs = pick(sign0, sign1, sign2, sign3, (coordinate >> 7) & 3)
        moved = 15 + 16 * (coordinate & 1) - ((coordinate & 127) >> 3)
        bit = (signs >> moved.to(tl.uint32)) & 1
        column = coordinate - (first_block64 * length + lead)
        held = (target < length) & (column >= 0) & (column < columns)
        mask = (b < batch)[:, None] & held[None, :]
        read = tl.load(row_of_values + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.where(bit[None, :] == 1, -read, read)
    k = sketch * length + target
    place = out + (split * batch + b).to(tl.int64)[:, None] * rows + k[None, :]
    tl.store(place, total, mask=(b < batch)[:, None] & (target < length)[None, :])


@frozen(eq=False)
class TritonShiftedKernel:
    """A `Kernel` of signed shifts on CUDA: ``add`` is fused, the rest is that of torch.

    Args:
        shifted: The same matrix, added by torch.
    """

    shifted: ShiftedKernel

    @property
    def scale(self) -> float:
        """Return 1/sqrt(s)."""
        return self.shifted.scale

    def add(self, values: Tensor, start: int, out: Tensor) -> None:
        """Add ``M[:, start:start+m] v`` for every row v to ``out``; rows of float64 by torch."""
        if values.dtype == torch.float64:
            self.shifted.add(values, start, out)
        elif values.numel():
            out.add_(summed_shifted(values, start, self.shifted))

    def adjoint(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]^T k`` for every row k."""
        return self.shifted.adjoint(keys, start, stop)

    def matrix(self, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]``."""
        return self.shifted.matrix(start, stop)


def summed_shifted(values: Tensor, start: int, shifted: ShiftedKernel) -> Tensor:
    """Return ``M[:, start:start+m] v`` for every row v in float32, ``[B, K]``."""
    if values.stride(1) != 1:
        values = values.contiguous()
    (batch, columns), length = values.shape, shifted.length
    first, last = start // length, -(-(start + columns) // length)
    each = -(-(last - first) // SPLITS)
    splits = -(-(last - first) // each)
    numbers = min(NUMBERS_AT_ONCE, triton.next_power_of_2(length))
    width = min(ROWS_AT_ONCE, triton.next_power_of_2(batch))
    tiles = triton.cdiv(length, numbers)
    partial = torch.empty(splits, batch, shifted.rows, dtype=torch.float32, device=values.device)
    with torch.cuda.device_of(values):
        launch: Any = add_shifted[(shifted.nonzeros * tiles, splits, triton.cdiv(batch, width))]
        launch(
            values,
            partial,
            shifted.key & 0xFFFFFFFF,
            shifted.key >> 32,
            batch,
            columns,
            shifted.rows,
            values.stride(0),
            first,
            start - first * length,
            last - first,
            each,
            length,
            tiles,
            BLOCK_R=numbers,
            BLOCK_B=width,
            num_warps=4,
        )
    return partial.sum(0)
