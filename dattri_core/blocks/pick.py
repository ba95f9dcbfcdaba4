"""Single entries of rows, from their factors where that is cheaper than to form the rows.

Axes: B rows, T positions, O and I a layer's outputs and inputs, k entries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dattri_core.blocks.block import Block, item_of
from dattri_core.blocks.grouped import GroupedBlock
from dattri_core.blocks.inputs import OneHot, accumulate, is_one_hot
from dattri_core.blocks.outer import OuterBlock
from dattri_core.contract import limit_now

PICKED, WRITTEN = 160, 60
"""Multiply-adds of a matrix product in the time of one product of two gathered numbers, and in that
of writing one number of a formed row; measured on a CPU."""


def pick_entries(block: Block, places: Tensor, *, limit: int | None = None) -> Tensor:
    """Return some entries of every row, ``[B, k]``: those of its flat form at ``places``.

    Entry (o, i) of a row of factors is ``sum_t outputs[b,t,o] inputs[b,t,i]``. Rows are formed, a
    few at a time, only where all of them cost less than the entries alone.

    Args:
        block: B rows.
        places: In a flat row, ``[k]``, on the device of the rows.
        limit: Bytes of intermediates; default `dattri_core.contract.limit_now`.
    """
    limit = limit_now() if limit is None else limit
    if isinstance(block, (OuterBlock, GroupedBlock)) and _is_cheaper(block, len(places)):
        return _from_factors(block, places, limit)
    step = max(1, limit // max(1, math.prod(block.shape) * item_of(block)))
    parts = [
        accumulate(block.take(slice(start, start + step)).flat()).index_select(1, places)
        for start in range(0, max(1, len(block)), step)  # one empty slice when there are no rows
    ]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _is_cheaper(block: OuterBlock | GroupedBlock, count: int) -> bool:
    """Return whether entries cost less than rows, by their multiply-adds and what is written."""
    assert block.positions is not None
    one_hot = isinstance(block, OuterBlock) and is_one_hot(block.inputs)
    formed = math.prod(block.shape) * (WRITTEN if one_hot else WRITTEN + block.positions)
    return PICKED * block.positions * count < formed


def _from_factors(block: OuterBlock | GroupedBlock, places: Tensor, limit: int) -> Tensor:
    size = block.shape[1]
    output, entry = places // size, places % size
    outputs = accumulate(block.outputs)
    inputs: Tensor | OneHot
    if isinstance(block, GroupedBlock):
        # Inputs of all groups beside one another: an output has those of its own group.
        entry = output // block.outputs.shape[3] * size + entry
        outputs, inputs = outputs.flatten(2), accumulate(block.inputs).flatten(2)
    else:
        given = block.own_inputs
        inputs = given if isinstance(given, OneHot) else accumulate(given)
    rows, positions, _ = outputs.shape
    # The positions of an entry lie side by side, so that they are copied together.
    outputs = outputs.mT.contiguous()  # [B, O, T]
    if isinstance(inputs, Tensor):
        inputs = inputs.mT.contiguous()
    found = outputs.new_empty(rows, len(places))
    room = max(1, limit // (3 * max(1, positions) * outputs.element_size()))  # entries of rows
    width = max(1, min(len(places), room))
    step = max(1, room // width)
    for first in range(0, rows, step):
        here = slice(first, first + step)
        for start in range(0, len(places), width):
            there = slice(start, start + width)
            left = outputs[here].index_select(1, output[there])  # [b, k, T]
            if isinstance(inputs, OneHot):
                right = (inputs.index[here].unsqueeze(1) == entry[there].unsqueeze(1)).to(left)
            else:
                right = inputs[here].index_select(1, entry[there])
            found[here, there] = left.mul_(right).sum(2)
    return found
