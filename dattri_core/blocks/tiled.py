"""Inner products of factored rows with formed ones: the rows are formed a tile at a time.

A tile is some rows, some outputs and some inputs. On a processor it stays in the cache, and each
side of it is long enough for both products that it takes part in to run near the machine's rate: of
T positions and C formed rows, the one that forms it and the one that meets it. Tiles of all inputs
would leave few outputs, those of all outputs few rows.
"""

from __future__ import annotations

import math

import torch
from attrs import frozen
from torch import Tensor

from dattri_core.blocks.inputs import OneHot, Shared, pad_last, wide_product

ROWS = 64
"""Rows of a tile on a processor; twice as many where they meet as many."""
OUTPUTS = 64
"""Outputs of a tile on a processor, at least: more where a row has few inputs."""
INPUTS = 640
"""Inputs of a tile on a processor, at most where they are cut."""
COPY = 64
"""Multiply-adds in the time in which one number is copied: cut inputs copy the formed side."""
DEVICE_ROWS = 512
"""Rows of a tile on a device at most: more would leave too few outputs."""


@frozen
class Tile:
    """How many rows, outputs and inputs a tile has."""

    rows: int
    outputs: int
    inputs: int


def tile_of(
    rows: int,
    positions: int,
    outputs: int,
    inputs: int,
    met: int,
    item: int,
    limit: int,
    *,
    device: bool = False,
) -> Tile:
    """Return the tile in which factored rows are formed.

    Args:
        rows: That are to be formed.
        positions: Of a row.
        outputs: Of a row.
        inputs: Of a row.
        met: Formed rows on the other side.
        item: Bytes of a number.
        limit: Bytes that a tile and what it meets may take.
        device: Whether it is on an accelerator: all inputs, and as many outputs as there is room.
    """
    if device:
        room = max(1, limit // (max(1, inputs) * item))  # rows of outputs
        count = max(1, min(rows, DEVICE_ROWS, room))
        span = _even(outputs, room // count)
        return Tile(count, span - span % 8 if span > 8 else span, max(1, inputs))
    count = max(1, min(rows, ROWS if met < ROWS else 2 * ROWS))
    cut = rows * positions >= COPY * met
    wide = _even(inputs, INPUTS) if cut else max(1, inputs)
    high = _even(outputs, OUTPUTS * INPUTS // wide)
    room = max(1, limit // (item * (count + met)))  # numbers of a row
    high = min(high, max(1, room // wide))
    return Tile(count, high, min(wide, max(1, room)))


def inner_in_tiles(outputs: Tensor, inputs: Tensor | Shared, formed: Tensor, limit: int) -> Tensor:
    """Return all inner products ``[B, C]`` of factored rows with formed ones.

    Args:
        outputs: ``[B, T, O]``.
        inputs: ``[B, T, I]``, or those that rows share.
        formed: ``[C, O I]``.
        limit: Bytes that a tile and what it meets may take.
    """
    (count, positions, height), width = outputs.shape, _width(inputs)
    device = outputs.device.type != "cpu"
    item = max(4, outputs.element_size())
    tile = tile_of(count, positions, height, width, len(formed), item, limit, device=device)
    total = formed.new_zeros(len(formed), count)  # of this shape the products are faster
    there = formed.reshape(-1, height, width)
    for first in range(0, height, tile.outputs):
        high = slice(first, first + tile.outputs)
        for left in range(0, width, tile.inputs):
            wide = slice(left, left + tile.inputs)
            met: Tensor | None = None  # [C, n]
            for start in range(0, count, tile.rows):
                rows = slice(start, start + tile.rows)
                part = wide_product(outputs[rows, :, high].mT, _cut(inputs, rows, wide))
                if met is None:  # a product that was widened is met by as many numbers
                    some = there[:, high, wide]
                    met = pad_last(some, part.shape[2] - some.shape[2]).flatten(1)
                    lines = some.shape[1]
                into = total[:, rows]
                torch.addmm(into, met, part[:, :lines].flatten(1).T, out=into)
    return total.T.contiguous()


def _cut(inputs: Tensor | Shared, rows: slice, wide: slice) -> Tensor:
    """Return some inputs of some rows, ``[b, T, i]``."""
    if isinstance(inputs, Tensor):
        return inputs[rows, :, wide]
    held = inputs.values
    assert isinstance(held, Tensor)
    return held[:, :, wide].index_select(0, inputs.index[rows].to(held.device))


def _width(inputs: Tensor | Shared) -> int:
    held = inputs.values if isinstance(inputs, Shared) else inputs
    assert not isinstance(held, OneHot)
    return int(held.shape[2])


def _even(whole: int, most: int) -> int:
    """Return the size of even parts of a whole, each of at most so many."""
    return max(1, math.ceil(whole / math.ceil(max(1, whole) / max(1, most))))
