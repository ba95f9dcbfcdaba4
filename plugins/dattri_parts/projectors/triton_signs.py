"""The dense sketch with signs as one fused kernel: no sign is written to memory.

Tensor cores multiply signs with rows in bfloat16, in which signs are exact and a row is the exact
sum of one part (bfloat16), two (float16) or three (float32). Partial sums of ranges of columns are
added in a fixed order, so that a result is the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from dattri_parts.projectors.entries import SPAN
from dattri_parts.projectors.tiled import TiledKernel

SPLITS = 64
"""Ranges of columns, each summed by programs of its own."""
ROWS_AT_ONCE = 64
BLOCK = 128
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@triton.jit(do_not_specialize=["key_low", "key_high", "first_span", "lead"])
def multiply_signs(
    values,
    out,
    key_low,
    key_high,
    batch,
    columns,
    rows,
    stride,
    first_span,
    lead,
    spans,
    spans_each,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Write the sums of one range of columns to ``out[split, b, k]``; see `entries` for the order.

    Column ``lead`` of the first span is the first column of ``values [batch, columns]``.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    none = tl.zeros((BLOCK_K, 4), tl.uint32)
    row = k.to(tl.uint32)[:, None] + none
    low = key_low.to(tl.uint32)
    high = key_high.to(tl.uint32)
    eighth = tl.arange(0, 16).to(tl.uint32)
    first_span64 = first_span.to(tl.int64)
    first_column = tl.arange(0, 128).to(tl.int64) - lead
    wide = first_span64 * 0 + 128  # a row may have more columns than 32 bits count
    row_of_values = values + b.to(tl.int64)[None, :] * stride
    total = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
    for span in range(split * spans_each, tl.minimum(spans, (split + 1) * spans_each)):
        at = (first_span64 + span) * 4 + tl.arange(0, 4)
        at_low = at.to(tl.uint32)[None, :] + none
        at_high = (at >> 32).to(tl.uint32)[None, :] + none
        word0, word1, word2, word3 = tl.philox_impl(at_low, row, none, at_high, low, high, 10)
        for quarter in tl.static_range(4):
            if quarter == 0:
                word = word0
            elif quarter == 1:
                word = word1
            elif quarter == 2:
                word = word2
            else:
                word = word3
            # Both halves of a word hold signs: even columns in the lower, odd ones in the upper.
            pair = ((word[:, None, :] << eighth[None, :, None]) & 0x80008000) | 0x3F803F80
            even = pair.to(tl.uint16).to(tl.bfloat16, bitcast=True)
            odd = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            signs = tl.reshape(tl.join(even, odd), (BLOCK_K, 128))
            column = first_column + (4 * span + quarter) * wide
            held = (column >= 0) & (column < columns)
            mask = held[:, None] & (b < batch)[None, :]
            rest = tl.load(row_of_values + column[:, None], mask=mask, other=0.0).to(tl.float32)
            for _ in tl.static_range(PARTS):
                part = rest.to(tl.bfloat16)
                total = tl.dot(signs, part, total)
                rest -= part.to(tl.float32)
    place = out + (split * batch + b).to(tl.int64)[None, :] * rows + k[:, None]
    tl.store(place, total, mask=(k < rows)[:, None] & (b < batch)[None, :])


@frozen(eq=False)
class TritonSignsKernel:
    """A `Kernel` of signs on CUDA: ``add`` is fused, the rest is that of torch.

    Args:
        key: Of the signs.
        tiled: The same matrix, multiplied by torch.
    """

    key: int
    tiled: TiledKernel

    @property
    def scale(self) -> float:
        """Return 1/sqrt(K)."""
        return self.tiled.scale

    def add(self, values: Tensor, start: int, out: Tensor) -> None:
        """Add ``M[:, start:start+m] v`` for every row v to ``out``; rows of float64 by torch."""
        if values.dtype not in PARTS:
            self.tiled.add(values, start, out)
        elif values.numel():
            out.add_(summed_signs(values, start, self.key, out.shape[1]))

    def adjoint(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]^T k`` for every row k."""
        return self.tiled.adjoint(keys, start, stop)

    def matrix(self, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]``."""
        return self.tiled.matrix(start, stop)


def summed_signs(values: Tensor, start: int, key: int, rows: int) -> Tensor:
    """Return ``M[:, start:start+m] v`` for every row v in float32, ``[B, K]``."""
    if values.stride(1) != 1:
        values = values.contiguous()
    batch, columns = values.shape
    first, last = start // SPAN, -(-(start + columns) // SPAN)
    each = -(-(last - first) // SPLITS)
    splits = -(-(last - first) // each)
    width = min(ROWS_AT_ONCE, max(16, triton.next_power_of_2(batch)))
    partial = torch.empty(splits, batch, rows, dtype=torch.float32, device=values.device)
    grid = (triton.cdiv(rows, BLOCK), splits, triton.cdiv(batch, width))
    with torch.cuda.device_of(values):
        launch: Any = multiply_signs[grid]
        launch(
            values,
            partial,
            key & 0xFFFFFFFF,
            key >> 32,
            batch,
            columns,
            rows,
            values.stride(0),
            first,
            start - first * SPAN,
            last - first,
            each,
            PARTS=PARTS[values.dtype],
            BLOCK_K=BLOCK,
            BLOCK_B=width,
            num_warps=4,
            num_stages=1,  # a pipeline of float32 rows would not fit shared memory
        )
    return partial.sum(0)
