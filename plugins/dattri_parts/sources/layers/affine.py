"""What linear layers and convolutions share: y = W x + b at every position."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dattri_core import Block, BlockSpec, DenseBlock, OuterBlock, ParameterView

AFFINE = frozenset({"weight", "bias"})


def affine_spec(
    name: str,
    outputs: int,
    inputs: int,
    module: nn.Module,
    trained: Mapping[str, str],
    *,
    transposed: bool = False,
) -> BlockSpec | None:
    """Return the outer block (O, I) with the bias as last column, or (O,) for a bias alone."""
    if not AFFINE.issuperset(trained):
        return None
    views = []
    if "weight" in trained:
        shape = tuple(module.get_parameter("weight").shape)
        views.append(ParameterView(trained["weight"], shape, 0, inputs, transposed))
    if "bias" in trained:
        start = inputs if "weight" in trained else 0
        views.append(ParameterView(trained["bias"], (outputs,), start, start + 1))
    if "weight" not in trained:
        return BlockSpec(name, "dense", (outputs,), views)
    return BlockSpec(name, "outer", (outputs, views[-1].stop), views)


def affine_rows(
    module: nn.Module, trained: Mapping[str, str], inputs: Tensor, grads: Tensor
) -> Block:
    """Return ``sum_t grads[n,t] (x) [inputs[n,t], 1]`` as factors; formed for a bias alone.

    Args:
        module: The layer.
        trained: Which of weight and bias take part.
        inputs: ``[N, T, I]``.
        grads: ``[N, T, O]``.
    """
    if "weight" not in trained:
        return DenseBlock(grads.to(dtype_of(module, trained)).sum(1))
    dtype = dtype_of(module, trained)
    inputs, grads = inputs.to(dtype), grads.to(dtype)
    if "bias" in trained:
        inputs = _with_ones(inputs)
    return OuterBlock(grads, inputs)


def _with_ones(inputs: Tensor) -> Tensor:
    """Return inputs ``[N, T, I + 1]``, in the order in memory that they have."""
    ones = inputs.new_ones(*inputs.shape[:2], 1)
    if inputs.stride(2) == 1:
        return torch.cat([inputs, ones], dim=2)
    first = (2, 0, 1)  # as patches of a convolution lie
    return torch.cat([inputs.permute(first), ones.permute(first)]).permute(1, 2, 0)


def dtype_of(module: nn.Module, trained: Mapping[str, str]) -> torch.dtype:
    """Return the dtype of the parameters: under autocast activations come in another one."""
    # Not get_parameter: a weight that was swapped in is a plain tensor.
    weight: Tensor = getattr(module, next(iter(trained)))
    return weight.dtype
