"""The block count-sketch as a fused kernel without atomics: each number of a row is read once.

A program owns some numbers of the sketch and reads, from every block of its range, the coordinates
that go there: neighbours in the sketch are neighbours in the row. Numbers of 16 bits are read in
pairs, as words of 32 bits that begin at even coordinates; after an odd shift such a pair lies
across two words of the sketch, so blocks of odd and of even shifts are summed apart. Signs are
drawn before, 512 of them from four counters, and kept as one bit each for a launch. Partial sums of
ranges of blocks are added in a fixed order, so that a result is the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from dattri_parts.projectors.entries import SPAN
from dattri_parts.projectors.shifted import ShiftedKernel
from dattri_parts.projectors.triton_signs import key_halves

PROGRAMS = 1024
"""For one group of rows, about: there are so many ranges of blocks, whatever the device and the
rows, that sums do not depend on either."""
LEAST_GROUPS = 32
"""Of four blocks in a range, so that partial sums stay few against what they sum."""
COUNTERS_AT_ONCE = 1024
SIGNS_AT_ONCE = 2**28
"""That are kept, 32 MiB of them, so that places in them are counted in 32 bits."""


@frozen
class Tiling:
    """How one program works: it owns ``words`` numbers or pairs of the sketch of ``rows`` rows.

    Args:
        words: The lanes of its warps go along them.
        rows: What is computed for a word serves all of them.
        warps: Of a program.
    """

    words: int
    rows: int
    warps: int


TILINGS = {4: Tiling(256, 16, 8), 2: Tiling(128, 16, 4)}
"""By the bytes of a number: those that read an H200's memory fastest."""


@triton.jit(do_not_specialize=["key_low", "key_high", "first_counter", "counters"])
def draw_signs(words, key_low, key_high, first_counter, counters, BLOCK: tl.constexpr):
    """Write the words of the counters of every series to ``words[series, counter, 4]``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    series = tl.program_id(1)
    counter = first_counter.to(tl.int64) + at
    none = tl.zeros((BLOCK,), tl.uint32)
    row = series.to(tl.uint32) + none
    low = key_low.to(tl.uint32)
    high = key_high.to(tl.uint32)
    word0, word1, word2, word3 = tl.philox_impl(
        counter.to(tl.uint32), row, none, (counter >> 32).to(tl.uint32), low, high, 10
    )
    place = words + (series * counters + at) * 4
    held = at < counters
    tl.store(place, word0.to(tl.int32, bitcast=True), mask=held)
    tl.store(place + 1, word1.to(tl.int32, bitcast=True), mask=held)
    tl.store(place + 2, word2.to(tl.int32, bitcast=True), mask=held)
    tl.store(place + 3, word3.to(tl.int32, bitcast=True), mask=held)


@triton.jit
def signed_ones(bits):
    """Return 1.0 with the highest bits as signs."""
    return ((bits & -0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit(
    do_not_specialize=[
        "key_low",
        "key_high",
        "batch",
        "columns",
        "rows",
        "stride",
        "first_block",
        "lead",
        "blocks",
        "groups_each",
        "length",
        "tiles",
        "ahead",
        "counters",
    ]
)
def add_shifted(
    values,
    signs,
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
    groups_each,
    length,
    tiles,
    ahead,
    counters,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Write the sums of one range of blocks to ``out[split, kind, b, k]``; see `shifted_columns`.

    Word ``lead`` of the first block is the first of ``values [batch, columns]``: numbers or, where
    PAIRS, two numbers each, and kinds are then the parity of the shift. Its sign is number
    ``ahead`` of those of `draw_signs`.
    """
    sketch = tl.program_id(0) // tiles
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(2)
    low = key_low.to(tl.uint32)
    high = key_high.to(tl.uint32)
    series = sketch.to(tl.uint32)
    words = signs + sketch * counters * 4
    # Rows past the last are that row, and not written: no load asks for its row.
    row_of_values = values + tl.minimum(b, batch - 1).to(tl.int64)[:, None] * stride
    even0 = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    if PAIRS:
        even1 = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        odd0 = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        odd1 = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    inner = length // 2 if PAIRS else length
    first_group = first_block.to(tl.int64) // 4
    skip = (first_block - first_group * 4).to(tl.int32)
    last = tl.minimum((blocks + skip + 3) // 4, (split + 1) * groups_each)
    for group in range(split * groups_each, last):
        counter = first_group + group
        drawn0, drawn1, drawn2, drawn3 = tl.philox_impl(
            counter.to(tl.uint32),
            series,
            series * 0 + 2,
            (counter >> 32).to(tl.uint32),
            low,
            high,
            10,
        )
        for quarter in tl.static_range(4):
            if quarter == 0:
                drawn = drawn0
            elif quarter == 1:
                drawn = drawn1
            elif quarter == 2:
                drawn = drawn2
            else:
                drawn = drawn3
            shift = ((drawn.to(tl.int64) * length) >> 32).to(tl.int32)
            inside = n - (shift // 2 if PAIRS else shift)
            inside = tl.where(inside < 0, inside + inner, inside)
            column = (group * 4 + quarter - skip) * inner + inside - lead
            held = (n < inner) & (column >= 0) & (column < columns)
            # All but one are neighbours, which says along what the lanes of a warp should go.
            column = tl.max_contiguous(column, BLOCK_N)
            place = (column * 2 if PAIRS else column) + ahead
            at = (place >> 9) * 16 + (place & 6) * 2 + ((place >> 7) & 3)
            word = tl.load(words + at, mask=held, other=0)
            eighth = (place & 127) >> 3
            read = tl.load(row_of_values + column[None, :], mask=held[None, :], other=0)
            if PAIRS:
                sign0 = signed_ones(word << (eighth + 16))[None, :]
                sign1 = signed_ones(word << eighth)[None, :]
                if HALF:
                    read0 = read.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                    read1 = (read >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                else:
                    read0 = (read << 16).to(tl.float32, bitcast=True)
                    read1 = (read & -0x10000).to(tl.float32, bitcast=True)
                if shift % 2 == 0:
                    even0 += read0 * sign0
                    even1 += read1 * sign1
                else:
                    odd0 += read0 * sign0
                    odd1 += read1 * sign1
            else:
                sign = signed_ones(word << (eighth + 16 * (1 - (place & 1))))
                even0 += read.to(tl.float32) * sign[None, :]
    held_rows = (b < batch)[:, None] & (n < inner)[None, :]
    kinds = 2 if PAIRS else 1
    place_of_rows = out + (split * kinds * batch + b).to(tl.int64)[:, None] * rows + sketch * length
    if PAIRS:
        number = 2 * n[None, :]
        tl.store(place_of_rows + number, even0, mask=held_rows)
        tl.store(place_of_rows + number + 1, even1, mask=held_rows)
        place_of_odd = place_of_rows + batch.to(tl.int64) * rows
        tl.store(place_of_odd + number + 1, odd0, mask=held_rows)
        turned = tl.where(number + 2 == length, 0, number + 2)
        tl.store(place_of_odd + turned, odd1, mask=held_rows)
    else:
        tl.store(place_of_rows + n[None, :], even0, mask=held_rows)


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
    batch, columns = values.shape
    total = torch.zeros(batch, shifted.rows, dtype=torch.float32, device=values.device)
    step = SPAN * max(1, SIGNS_AT_ONCE // (SPAN * shifted.nonzeros))
    with torch.cuda.device_of(values):
        for at in range(0, columns, step):
            total += _summed(values[:, at : at + step], start + at, shifted)
    return total


def _summed(values: Tensor, start: int, shifted: ShiftedKernel) -> Tensor:
    """Return the same of columns whose signs can be kept."""
    (batch, columns), length = values.shape, shifted.length
    first_span, last_span = start // SPAN, -(-(start + columns) // SPAN)
    counters = 4 * (last_span - first_span)
    signs = torch.empty(shifted.nonzeros, counters, 4, dtype=torch.int32, device=values.device)
    draw: Any = draw_signs[triton.cdiv(counters, COUNTERS_AT_ONCE), shifted.nonzeros]
    key = key_halves(shifted.key)
    draw(signs, *key, 4 * first_span, counters, BLOCK=COUNTERS_AT_ONCE)
    tiling = TILINGS[values.element_size()]
    pairs, half = _in_pairs(values, start, length), values.dtype == torch.float16
    width, words = (2, values.view(torch.int32)) if pairs else (1, values)
    first, last = start // length, -(-(start + columns) // length)
    tiles = shifted.nonzeros * triton.cdiv(length // width, tiling.words)
    groups = -(-last // 4) - first // 4
    each = max(LEAST_GROUPS, -(-groups // max(1, PROGRAMS // tiles)))
    splits = -(-groups // each)
    together = min(tiling.rows, triton.next_power_of_2(batch))
    partial = torch.empty(
        splits * width, batch, shifted.rows, dtype=torch.float32, device=values.device
    )
    launch: Any = add_shifted[tiles, triton.cdiv(batch, together), splits]
    launch(
        words,
        signs,
        partial,
        *key,
        batch,
        words.shape[1],
        shifted.rows,
        words.stride(0),
        first,
        (start - first * length) // width,
        last - first,
        each,
        length,
        tiles // shifted.nonzeros,
        start - first_span * SPAN,
        counters,
        PAIRS=pairs,
        HALF=half,
        BLOCK_N=tiling.words,
        BLOCK_B=together,
        num_warps=tiling.warps,
    )
    return partial.sum(0)


def _in_pairs(values: Tensor, start: int, length: int) -> bool:
    """Return whether all numbers can be read two at a time, from even coordinates."""
    even = (start, length, values.shape[1], values.stride(0), values.storage_offset())
    return values.element_size() == 2 and not any(number % 2 for number in even)
