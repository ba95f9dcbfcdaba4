"""Convolutions in one, two and three dimensions, as a linear layer at every output position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import frozen
from torch import Tensor, nn

from dattri_core import Block, BlockSpec, GroupedBlock, ParameterView
from dattri_parts.sources.layers.affine import AFFINE, affine_rows, affine_spec, dtype_of


@frozen
class ConvolutionRule:
    """``nn.Conv1d/2d/3d``: dL/dW = sum_p g_p patch_p^T over output positions p.

    With one group the block is outer, (O, I k) and the bias as last column. With more groups it is
    grouped, (O, I/groups k): a group's rows of W meet that group's patches only, so that the
    gradient is a stack of outer products with different inputs.
    """

    leading: ClassVar[bool] = True

    def spec(self, name: str, module: nn.Module, trained: Mapping[str, str]) -> BlockSpec | None:
        """Return the block of the kernel, flattened to (O, I/groups k), bias as last column."""
        assert isinstance(module, nn.modules.conv._ConvNd)
        inputs = module.in_channels // module.groups * math.prod(module.kernel_size)
        outputs = module.out_channels
        if module.groups == 1 or "weight" not in trained or not AFFINE.issuperset(trained):
            return affine_spec(name, outputs, inputs, module, trained)
        views = [ParameterView(trained["weight"], tuple(module.weight.shape), 0, inputs)]
        if "bias" in trained:
            views.append(ParameterView(trained["bias"], (outputs,), inputs, inputs + 1))
        return BlockSpec(name, "grouped", (outputs, views[-1].stop), views)

    def rows(
        self, module: nn.Module, trained: Mapping[str, str], inputs: Tensor, grads: Tensor
    ) -> Block:
        """Return factors, or a stack of them for each group, of inputs ``[N, I, ...]``."""
        assert isinstance(module, nn.modules.conv._ConvNd)
        grads = grads.flatten(2)  # [N, O, P]
        if "weight" not in trained:
            return affine_rows(module, trained, inputs, grads.mT)
        patches = _patches(module, inputs)
        if module.groups == 1:
            return affine_rows(module, trained, patches, grads.mT)
        return _grouped(module, trained, patches, grads)


def _grouped(
    module: nn.modules.conv._ConvNd, trained: Mapping[str, str], patches: Tensor, grads: Tensor
) -> Block:
    dtype, groups = dtype_of(module, trained), module.groups
    shape = (*patches.shape[:2], groups, -1)
    inputs = patches.reshape(shape).to(dtype)  # [N, P, g, I/g k]
    outputs = grads.mT.reshape(shape).to(dtype)  # [N, P, g, O/g]
    if "bias" in trained:
        inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:3], 1)], dim=3)
    return GroupedBlock(outputs, inputs)


def _patches(module: nn.modules.conv._ConvNd, inputs: Tensor) -> Tensor:
    """Return the inputs under the kernel at each output position, ``[N, P, I k]``.

    They lie in memory as ``[I k, N, P]``: positions of a line are copied as they stand, which is
    three times as fast as one kernel after another, and products read either order at one rate.
    """
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    padded = _pad(module, inputs)
    axes = len(kernel)
    for axis in range(axes):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        padded = padded.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    # [N, I, P..., k...] -> [I, k..., N, P...]
    windows = padded.permute(1, *range(2 + axes, 2 + 2 * axes), 0, *range(2, 2 + axes))
    width, positions = inputs.shape[1] * math.prod(kernel), math.prod(windows.shape[-axes:])
    return windows.reshape(width, len(inputs), positions).permute(1, 2, 0)


def _pad(module: nn.modules.conv._ConvNd, inputs: Tensor) -> Tensor:
    sides: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):  # F.pad counts from the last axis
        if module.padding == "valid":
            sides += [0, 0]
        elif module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            sides += [total // 2, total - total // 2]
        else:
            assert not isinstance(module.padding, str)
            sides += [module.padding[axis]] * 2
    if not any(sides):
        return inputs
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return nn.functional.pad(inputs, sides, mode=mode)
