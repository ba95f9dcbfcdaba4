"""The dense sketch with signs as one fused kernel: no sign is written to memory.

Tensor cores multiply signs with rows in bfloat16, in which signs are exact and a row is the exact
sum of one part (bfloat16), two (float16) or three (float32), each a row of its own. The signs of a
tile go from the generator to the tensor cores in registers; rows come by the tensor memory
accelerator where the device has one, the next span while one is multiplied. Partial sums of ranges
of columns are added in a fixed order, so that a result is the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dattri_parts.projectors.entries import SPAN
from dattri_parts.projectors.tiled import TiledKernel

SPLITS = 66
"""Ranges of columns, each summed by programs of its own: 132 processors, as on an H100 or H200,
take whole waves of them for any power of two of tiles. The number is the same on every device, so
that sums are, too."""
LEAST_SPANS = 8
"""Of a range, so that partial sums stay few against what they sum."""
ROWS_AT_ONCE = 64
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
PARTIAL_BYTES = 2**30
"""Of the partial sums that are kept at once; bounds the rows of a launch, never the sums."""
PARTS_BYTES = 2**29
"""Of the parts of rows that are written at once."""
NUMBERS_AT_ONCE = 1024
"""Of a row that one program writes as parts."""
COLUMNS_AT_ONCE = 2**30
"""Of one launch, whose columns are counted in 32 bits."""
ALIGNED = 8
"""Numbers of bfloat16 in 16 bytes, at multiples of which the rows of a tile must begin."""
LARGE_SHARED_MEMORY = {(8, 0), (9, 0), (10, 0), (10, 3)}
"""Compute capabilities with room for the next span of rows beside the one that is multiplied."""
ONES = 0x3F803F80
"""Two ones in bfloat16. A kernel takes them as an argument: of two constants, the instruction that
cuts a sign out and one that puts it on a number would be two."""


@frozen
class Tiling:
    """How one program works: it multiplies ``rows`` of the matrix with `ROWS_AT_ONCE` rows.

    Args:
        rows: Of the matrix.
        warps: Of a program.
        stages: 2 loads the next span while one is multiplied; it takes 128 KiB of shared memory.
    """

    rows: int
    warps: int
    stages: int


WIDE = Tiling(256, 8, 2)
"""Halves the reading of rows from the second-level cache, against the narrow one."""
NARROW = Tiling(128, 4, 2)


@triton.jit(
    do_not_specialize=[
        "key_low",
        "key_high",
        "batch",
        "first_span",
        "lead",
        "spans",
        "spans_each",
        "ones",
    ]
)
def multiply_signs(
    values,
    out,
    key_low,
    key_high,
    batch,
    rows,
    first_span,
    lead,
    spans,
    spans_each,
    ones,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the sums of one range of columns to ``out[split, b, k]``; see `entries` for the order.

    Column ``lead`` of the first span is the first of ``values``, a descriptor of rows in bfloat16
    that gives zeros outside of them. Programs of one range run side by side and share its cache.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first_b = tl.program_id(1) * BLOCK_B
    split = tl.program_id(2)
    none = tl.zeros((BLOCK_K, 4), tl.uint32)
    row = k.to(tl.uint32)[:, None] + none
    low = key_low.to(tl.uint32)
    high = key_high.to(tl.uint32)
    one_pair = ones.to(tl.uint32)
    eighth = tl.arange(0, 16).to(tl.uint32)
    total = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
    last = tl.minimum(spans, (split + 1) * spans_each)
    for span in tl.range(split * spans_each, last, num_stages=STAGES):
        at = (first_span.to(tl.int64) + span) * 4 + tl.arange(0, 4)
        at_low = at.to(tl.uint32)[None, :] + none
        at_high = (at >> 32).to(tl.uint32)[None, :] + none
        word0, word1, word2, word3 = tl.philox_impl(at_low, row, none, at_high, low, high, 10)
        column = span * 512 - lead
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
            pair = ((word[:, None, :] << eighth[None, :, None]) & 0x80008000) | one_pair
            even = pair.to(tl.uint16).to(tl.bfloat16, bitcast=True)
            odd = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            signs = tl.reshape(tl.join(even, odd), (BLOCK_K, 128))
            part = values.load([first_b, column + 128 * quarter])
            total = tl.dot(signs, part.T, total)
        # The sums are looked at here, which waits for the tensor cores: a product still at work in
        # the next round would hold the registers of its signs, and all products would be serial.
        total = total.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
    b = first_b + tl.arange(0, BLOCK_B)
    place = out + (split * batch + b).to(tl.int64)[None, :] * rows + k[:, None]
    tl.store(place, total, mask=(k < rows)[:, None] & (b < batch)[None, :])


@triton.jit(do_not_specialize=["tiles"])
def write_parts(
    values,
    out,
    columns,
    stride,
    lead,
    width,
    part_stride,
    tiles,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write rows as parts in bfloat16 to ``out[part, b, width]``, after ``lead`` zeros."""
    at = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    held = (at >= lead) & (at < lead + columns)
    rest = tl.load(values + b * stride + (at - lead), mask=held, other=0.0).to(tl.float32)
    for which in tl.static_range(PARTS):
        part = rest.to(tl.bfloat16)
        tl.store(out + which * part_stride + b * width + at, part, mask=at < width)
        rest -= part.to(tl.float32)


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
    total = torch.zeros(len(values), rows, dtype=torch.float32, device=values.device)
    with torch.cuda.device_of(values):
        tiling = chosen_tiling(rows, values.device)
        for parts, first in _parts(values, start):
            summed = multiplied(parts, first, key, rows, tiling)
            total += summed.view(-1, len(values), rows).sum(0)
    return total


def chosen_tiling(rows: int, device: torch.device) -> Tiling:
    """Return how programs work on a device, which does not change the order of sums."""
    tiling = WIDE if rows > NARROW.rows else NARROW
    large = torch.cuda.get_device_capability(device) in LARGE_SHARED_MEMORY
    return tiling if large else Tiling(NARROW.rows, NARROW.warps, 1)


def multiplied(values: Tensor, start: int, key: int, rows: int, tiling: Tiling) -> Tensor:
    """Return ``M[:, start:start+m] v`` for rows in bfloat16 that are aligned, ``[B, K]``."""
    spans = -(-(start + values.shape[1]) // SPAN) - start // SPAN
    each = max(LEAST_SPANS, -(-spans // SPLITS))
    splits = -(-spans // each)
    step = ROWS_AT_ONCE * max(1, PARTIAL_BYTES // (4 * splits * rows * ROWS_AT_ONCE))
    summed = values.new_empty(len(values), rows, dtype=torch.float32)
    for part, out in zip(values.split(step), summed.split(step), strict=True):
        partial = out.new_empty(splits, len(part), rows)
        _launch(part, start, key, (spans, each), partial, tiling)
        torch.sum(partial, 0, out=out)
    return summed


def _launch(
    values: Tensor,
    start: int,
    key: int,
    spans: tuple[int, int],
    partial: Tensor,
    tiling: Tiling,
) -> None:
    """Write the sums of ranges of columns; ``spans`` are all of them, and those of a range."""
    splits, batch, rows = partial.shape
    width = min(ROWS_AT_ONCE, max(16, triton.next_power_of_2(batch)))
    box = [width, SPAN // 4]
    launch: Any = multiply_signs[triton.cdiv(rows, tiling.rows), triton.cdiv(batch, width), splits]
    launch(
        TensorDescriptor(values, list(values.shape), [values.stride(0), 1], box),
        partial,
        *key_halves(key),
        batch,
        rows,
        start // SPAN,
        start % SPAN,
        *spans,
        ONES,
        BLOCK_K=tiling.rows,
        BLOCK_B=width,
        STAGES=tiling.stages,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


def key_halves(key: int) -> tuple[int, int]:
    """Return both halves of a key as signed integers of 32 bits: one kind of argument."""
    low, high = key & 0xFFFFFFFF, key >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def _parts(values: Tensor, start: int) -> Iterator[tuple[Tensor, int]]:
    """Yield rows in bfloat16, the parts of all rows one after another, and their first coordinate.

    They are the rows themselves where these can be read in tiles, and else a copy, a range of
    columns at a time.
    """
    if values.stride(1) != 1:
        values = values.contiguous()
    count, (batch, columns) = PARTS[values.dtype], values.shape
    if count == 1 and _aligned(values, start):
        for at in range(0, columns, COLUMNS_AT_ONCE):
            yield values[:, at : at + COLUMNS_AT_ONCE], start + at
        return
    step = SPAN * max(1, PARTS_BYTES // (2 * SPAN * count * batch))
    at = 0
    while at < columns:
        last = min(columns, at + step - (start + at) % SPAN)
        lead = (start + at) % ALIGNED
        width = -(-(lead + last - at) // 16) * 16  # so known to the compiler, as no other multiple
        parts = torch.empty(count * batch, width, dtype=torch.bfloat16, device=values.device)
        tiles = triton.cdiv(width, NUMBERS_AT_ONCE)
        launch: Any = write_parts[(tiles * batch,)]
        launch(
            values[:, at:last],
            parts,
            last - at,
            values.stride(0),
            lead,
            width,
            batch * width,
            tiles,
            PARTS=count,
            BLOCK=NUMBERS_AT_ONCE,
        )
        yield parts, start + at - lead
        at = last


def _aligned(values: Tensor, start: int) -> bool:
    """Return whether tiles of rows can be read: they begin at multiples of 16 bytes."""
    stride = values.stride(0)
    return (
        start % ALIGNED == 0
        and values.data_ptr() % (2 * ALIGNED) == 0
        and stride % ALIGNED == 0
        and stride >= values.shape[1]
    )
