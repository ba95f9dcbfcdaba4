"""Turning the rows of one call into those of a block: fold, turn, join, and compare.

One weight may sit in an embedding, stored (D, V), and in a head, stored (V, D): its block has the
orientation of the first, and the factors of the second swap roles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dattri_core import (
    Block,
    BlockSpec,
    DenseBlock,
    GroupedBlock,
    OneHot,
    OuterBlock,
    ParameterView,
)


def formed_stacks(sink: Callable[[str, Block], None]) -> Callable[[str, Block], None]:
    """Return a sink that forms stacks of factors: test rows wait, and formed they are smaller."""

    def formed(name: str, block: Block) -> None:
        sink(name, block.dense() if isinstance(block, GroupedBlock) else block)

    return formed


def fold_calls(block: Block, count: int) -> Block:
    """Return B rows of B k: the k rows of an example, next to each other, are added."""
    if len(block) == count:
        return block
    if isinstance(block, GroupedBlock):
        pair = (_by_example(side, count).flatten(1, 2) for side in (block.outputs, block.inputs))
        return GroupedBlock(*pair)
    if not isinstance(block, OuterBlock):
        return DenseBlock(_by_example(block.dense().values, count).sum(1))
    outputs, inputs = _by_example(block.outputs, count).flatten(1, 2), block.own_inputs
    if isinstance(inputs, OneHot):
        index = _by_example(inputs.index, count).flatten(1, 2)
        return OuterBlock(outputs, OneHot(index, inputs.size))
    return OuterBlock(outputs, _by_example(inputs, count).flatten(1, 2))


def turn(block: Block, own: BlockSpec, target: BlockSpec) -> Block:
    """Return rows in the orientation and kind of the target block."""
    if target.kind == "dense" and own.kind != "dense":
        return turn(block.dense(), _as_dense(own), target)
    if _layout(own) == _layout(target):
        return block
    if isinstance(block, OuterBlock) and target.kind == "outer":
        return OuterBlock(_vectors(block), block.outputs)
    values = block.dense().values
    view = own.parameters[0]
    return DenseBlock(parameter_values(own, view, values).reshape(len(block), *target.shape))


def join_calls(blocks: Sequence[Block]) -> Block:
    """Return the sum of rows: factors are put one after another along positions."""
    if len(blocks) == 1:
        return blocks[0]
    stacks = [block for block in blocks if isinstance(block, GroupedBlock)]
    if len(stacks) == len(blocks) and len({stack.outputs.shape[2] for stack in stacks}) == 1:
        sides = ([s.outputs for s in stacks], [s.inputs for s in stacks])
        return GroupedBlock(*(torch.cat(side, dim=1) for side in sides))
    outer = [block for block in blocks if isinstance(block, OuterBlock)]
    if len(outer) < len(blocks):
        total = blocks[0].dense().values
        for block in blocks[1:]:
            total = total + block.dense().values
        return DenseBlock(total)
    outputs = torch.cat([block.outputs for block in outer], dim=1)
    inputs = [block.own_inputs for block in outer]
    hot = [one for one in inputs if isinstance(one, OneHot)]
    if len(hot) == len(outer):
        index = torch.cat([one.index for one in hot], dim=1)
        return OuterBlock(outputs, OneHot(index, hot[0].size))
    return OuterBlock(outputs, torch.cat([_vectors(block) for block in outer], dim=1))


def zero_block(spec: BlockSpec, count: int, dtype: torch.dtype, device: torch.device) -> Block:
    """Return rows of zeros, which take no memory, for a parameter that the loss does not reach."""
    zero = torch.zeros((), dtype=dtype, device=device)
    if spec.kind == "outer":
        outputs, inputs = spec.shape
        return OuterBlock(zero.expand(count, 1, outputs), zero.expand(count, 1, inputs))
    if spec.kind == "grouped":
        outputs, inputs = spec.shape
        return GroupedBlock(zero.expand(count, 1, 1, outputs), zero.expand(count, 1, 1, inputs))
    return DenseBlock(zero.expand(count, *spec.shape))


def dense_spec(name: str, parameter: str, shape: tuple[int, ...]) -> BlockSpec:
    """Return the block that holds one parameter as it is."""
    plain = BlockSpec(name, "dense", shape)
    view = ParameterView(parameter, shape, 0, plain.matrix_shape[1])
    return BlockSpec(name, "dense", shape, (view,))


def shared_spec(name: str, specs: Sequence[BlockSpec]) -> BlockSpec:
    """Return the block of a parameter that several modules hold: as in the first, or plain."""
    first = specs[0]
    view = first.parameters[0]
    if all(spec.kind == "outer" for spec in specs) or len({_layout(s) for s in specs}) == 1:
        return BlockSpec(name, first.kind, first.shape, first.parameters)
    return dense_spec(name, view.parameter, view.shape)


def parameter_values(spec: BlockSpec, view: ParameterView, values: Tensor) -> Tensor:
    """Return the rows of one parameter in its own shape, ``[B, *shape]``.

    Args:
        spec: The block.
        view: Which of its parameters.
        values: Formed rows of the block, ``[B, *spec.shape]``.
    """
    columns = values.reshape(len(values), *spec.matrix_shape)[:, :, view.start : view.stop]
    return (columns.mT if view.transposed else columns).reshape(len(values), *view.shape)


def _vectors(block: OuterBlock) -> Tensor:
    inputs = block.own_inputs
    return inputs.dense(block.outputs.dtype) if isinstance(inputs, OneHot) else inputs


def _by_example(values: Tensor, count: int) -> Tensor:
    return values.reshape(count, len(values) // count, *values.shape[1:])


def _layout(spec: BlockSpec) -> tuple[object, ...]:
    return (spec.kind, spec.shape, tuple(view.transposed for view in spec.parameters))


def _as_dense(spec: BlockSpec) -> BlockSpec:
    return BlockSpec(spec.name, "dense", spec.shape, spec.parameters)
