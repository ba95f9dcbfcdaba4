"""Blocks: the kinds of block that rows are made of; only this package knows them.

Axes: B and C rows, T and S positions, O and I a layer's outputs and inputs, m rows of a base, d
flat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dattri_core.blocks.block import Block, LinearFunction, explain_inner
from dattri_core.blocks.dense import DenseBlock
from dattri_core.blocks.inputs import OneHot, Shared, accumulate, held_by
from dattri_core.blocks.outer import OuterBlock, join_outer, low_rank
from dattri_core.blocks.span import SpanBlock, SumBlock
from dattri_core.contract import Shape

__all__ = [
    "Block",
    "DenseBlock",
    "LinearFunction",
    "OneHot",
    "OuterBlock",
    "Shared",
    "SpanBlock",
    "SumBlock",
    "accumulate",
    "compact",
    "concatenate",
    "explain_inner",
    "interleave",
    "low_rank",
    "shape_of",
]


def shape_of(block: Block) -> Shape:
    """Return what the contraction planner needs to know of a block."""
    return block.planned


def concatenate(blocks: Sequence[Block]) -> Block:
    """Join rows of several blocks of one shape; factors stay factors, positions are zero-padded.

    Spans of one base stay spans, sums of as many parts stay sums; other mixtures are formed.
    """
    if len(blocks) == 1:
        return blocks[0]
    outer = [block for block in blocks if isinstance(block, OuterBlock)]
    if len(outer) == len(blocks):
        return join_outer(outer)
    spans = [block for block in blocks if isinstance(block, SpanBlock)]
    if len(spans) == len(blocks) and all(span.base is spans[0].base for span in spans):
        return SpanBlock(torch.cat([span.coefficients for span in spans]), spans[0].base)
    sums = [block for block in blocks if isinstance(block, SumBlock)]
    if len(sums) == len(blocks) and len({len(total.parts) for total in sums}) == 1:
        parts = zip(*(total.parts for total in sums), strict=True)
        return SumBlock(tuple(concatenate(part) for part in parts))
    return DenseBlock(torch.cat([block.dense().values for block in blocks]))


def interleave(blocks: Sequence[Block]) -> Block:
    """Return row 0 of every block, then row 1 of every block...: row ``b K + k`` is block k's b.

    Factored rows whose inputs are one and the same tensor in every block keep them once.
    """
    outer = [block for block in blocks if isinstance(block, OuterBlock)]
    if len(blocks) == 1:
        return blocks[0]
    if len(outer) < len(blocks):
        return DenseBlock(torch.stack([b.dense().values for b in blocks], 1).flatten(0, 1))
    rows, held = len(outer[0]), held_by(outer[0].inputs)
    outputs = torch.stack([block.outputs for block in outer], 1).flatten(0, 1)
    if all(held_by(block.inputs) is held for block in outer):
        inputs = outer[0].own_inputs
        return OuterBlock(outputs, Shared(inputs, torch.arange(rows).repeat_interleave(len(outer))))
    joined = join_outer(outer)
    order = torch.arange(rows * len(outer)).reshape(len(outer), rows).T.flatten()
    return joined.take(order.to(joined.device))


def compact(block: Block) -> Block:
    """Return the same rows, formed where that takes fewer bytes: many positions, a small layer."""
    if not isinstance(block, OuterBlock):
        return block
    formed = len(block) * math.prod(block.shape) * max(4, block.dtype.itemsize)
    return block.dense() if formed < block.nbytes else block
