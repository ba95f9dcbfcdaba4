"""Blocks: the kinds of block that rows are made of; only this package knows them.

Axes: B and C rows, T and S positions, O and I a layer's outputs and inputs, m rows of a base, d
flat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dattri_core.blocks.block import Block, LinearFunction, explain_inner, inner_work
from dattri_core.blocks.dense import DenseBlock
from dattri_core.blocks.grouped import GroupedBlock
from dattri_core.blocks.inputs import (
    OneHot,
    Selection,
    Shared,
    accumulate,
    held_by,
    take_own,
)
from dattri_core.blocks.outer import OuterBlock, join_outer, low_rank
from dattri_core.blocks.pick import pick_entries
from dattri_core.blocks.span import SpanBlock, SumBlock
from dattri_core.blocks.swept import SweptBlock
from dattri_core.blocks.tensors import map_tensors
from dattri_core.contract import Shape

__all__ = [
    "Block",
    "DenseBlock",
    "GroupedBlock",
    "LinearFunction",
    "OneHot",
    "OuterBlock",
    "Selection",
    "Shared",
    "SpanBlock",
    "SumBlock",
    "SweptBlock",
    "accumulate",
    "compact",
    "concatenate",
    "explain_inner",
    "inner_work",
    "joins",
    "low_rank",
    "map_tensors",
    "pick_entries",
    "shape_of",
    "share",
]

SAME = 16
"""Roundings of the largest input by which equal inputs of a layer may differ."""


def shape_of(block: Block) -> Shape:
    """Return what the contraction planner needs to know of a block."""
    return block.planned


def concatenate(blocks: Sequence[Block]) -> Block:
    """Join rows of several blocks of one shape; factors stay factors, positions are zero-padded.

    Spans of one base stay spans, sums of as many parts stay sums; other mixtures, and stacks of
    factors, are formed.
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


def joins(blocks: Sequence[Block]) -> bool:
    """Return whether `concatenate` leaves blocks the kind that they are: nothing is formed."""
    first = blocks[0]
    if any(type(block) is not type(first) for block in blocks):
        return False
    if isinstance(first, SpanBlock):
        return all(isinstance(b, SpanBlock) and b.base is first.base for b in blocks)
    if isinstance(first, SumBlock):
        parts = [block.parts for block in blocks if isinstance(block, SumBlock)]
        if len({len(of) for of in parts}) > 1:
            return False
        return all(joins(part) for part in zip(*parts, strict=True))
    if isinstance(first, OuterBlock):
        return len({block.positions for block in blocks}) == 1
    return isinstance(first, DenseBlock)


def share(block: Block, group: Tensor) -> Block:
    """Return the same rows; inputs that rows of one group have in common are kept once.

    The rows of an example for each of its outputs have the same inputs in every layer. Inputs are
    taken to be the same where they agree to the rounding of a matrix product.

    Args:
        block: B rows.
        group: Rows of one number may have the same inputs, ``[B]``.
    """
    groups, place = torch.unique(group.cpu(), return_inverse=True)
    if not isinstance(block, OuterBlock) or len(groups) == len(block):
        return block
    inputs = block.own_inputs
    first = torch.full_like(groups, len(block))
    first.scatter_reduce_(0, place, torch.arange(len(block)), "amin")
    kept = take_own(inputs, first)
    held, apart = held_by(inputs), held_by(take_own(kept, place))
    if isinstance(inputs, OneHot) or held.numel() == 0:
        same = torch.equal(apart, held)
    else:
        allowed = SAME * torch.finfo(held.dtype).eps * held.abs().amax()
        same = bool((apart - held).abs().amax() <= allowed)
    return OuterBlock(block.outputs, Shared(kept, place)) if same else block


def compact(block: Block) -> Block:
    """Return the same rows, formed where that takes fewer bytes: many positions, a small layer."""
    if not isinstance(block, (OuterBlock, GroupedBlock)):
        return block
    formed = len(block) * math.prod(block.shape) * max(4, block.dtype.itemsize)
    return block.dense() if formed < block.nbytes else block
