"""Normalisations: y = normalised(x) * weight + bias, elementwise in a channel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional

from dattri_core import Block, BlockSpec, DenseBlock, ParameterView
from dattri_parts.sources.layers.affine import AFFINE, dtype_of


@frozen
class LayerNormRule:
    """``nn.LayerNorm``: dL/dw = sum_t g_t xhat_t, dL/db = sum_t g_t; block (C, 2)."""

    leading: ClassVar[bool] = False

    def spec(self, name: str, module: nn.Module, trained: Mapping[str, str]) -> BlockSpec | None:
        """Return the dense block, one row a channel: weight, bias."""
        return _spec(name, module, trained)

    def rows(
        self, module: nn.Module, trained: Mapping[str, str], inputs: Tensor, grads: Tensor
    ) -> Block:
        """Return formed rows; positions are summed."""
        assert isinstance(module, nn.LayerNorm)
        shape = list(module.normalized_shape)
        inputs, grads = _wide(inputs), _wide(grads)
        normal = functional.layer_norm(inputs, shape, None, None, module.eps)
        return _trailing(module, trained, normal, grads, math.prod(shape))


@frozen
class RMSNormRule:
    """``nn.RMSNorm``: dL/dw = sum_t g_t x_t / rms(x_t); block (C,)."""

    leading: ClassVar[bool] = False

    def spec(self, name: str, module: nn.Module, trained: Mapping[str, str]) -> BlockSpec | None:
        """Return the dense block."""
        return _spec(name, module, trained)

    def rows(
        self, module: nn.Module, trained: Mapping[str, str], inputs: Tensor, grads: Tensor
    ) -> Block:
        """Return formed rows; positions are summed."""
        assert isinstance(module, nn.RMSNorm)
        shape = list(module.normalized_shape)
        # The default epsilon is that of the dtype the model computes in.
        eps = torch.finfo(inputs.dtype).eps if module.eps is None else module.eps
        normal = functional.rms_norm(_wide(inputs), shape, None, eps)
        return _trailing(module, trained, normal, _wide(grads), math.prod(shape))


@frozen
class GroupNormRule:
    """``nn.GroupNorm``: dL/dw_c = sum_p g_cp xhat_cp; block (C, 2)."""

    leading: ClassVar[bool] = True

    def spec(self, name: str, module: nn.Module, trained: Mapping[str, str]) -> BlockSpec | None:
        """Return the dense block, one row a channel: weight, bias."""
        return _spec(name, module, trained)

    def rows(
        self, module: nn.Module, trained: Mapping[str, str], inputs: Tensor, grads: Tensor
    ) -> Block:
        """Return formed rows; positions are summed."""
        assert isinstance(module, nn.GroupNorm)
        normal = functional.group_norm(_wide(inputs), module.num_groups, None, None, module.eps)
        return _channels(module, trained, normal, _wide(grads))


@frozen
class BatchNormRule:
    """Batch norm in eval mode: dL/dw_c = sum_p g_cp (x_cp - mean_c) / std_c; block (C, 2)."""

    leading: ClassVar[bool] = True

    def spec(self, name: str, module: nn.Module, trained: Mapping[str, str]) -> BlockSpec | None:
        """Return the dense block, one row a channel; None without running statistics."""
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.running_mean is None or module.running_var is None:
            return None
        return _spec(name, module, trained)

    def rows(
        self, module: nn.Module, trained: Mapping[str, str], inputs: Tensor, grads: Tensor
    ) -> Block:
        """Return formed rows; positions are summed."""
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        assert module.running_mean is not None
        assert module.running_var is not None
        wide = _wide(inputs)
        mean, variance = module.running_mean.to(wide.dtype), module.running_var.to(wide.dtype)
        normal = functional.batch_norm(wide, mean, variance, eps=module.eps)
        return _channels(module, trained, normal, _wide(grads))


def _spec(name: str, module: nn.Module, trained: Mapping[str, str]) -> BlockSpec | None:
    if not AFFINE.issuperset(trained):
        return None
    shape = tuple(module.get_parameter(next(iter(trained))).shape)
    channels = math.prod(shape)
    order = [local for local in ("weight", "bias") if local in trained]
    views = [ParameterView(trained[local], shape, at, at + 1) for at, local in enumerate(order)]
    return BlockSpec(name, "dense", (channels, 2) if len(views) == 2 else (channels,), views)


def _trailing(
    module: nn.Module, trained: Mapping[str, str], normal: Tensor, grads: Tensor, channels: int
) -> Block:
    shape = (len(grads), -1, channels)
    return _columns(module, trained, normal.reshape(shape), grads.reshape(shape), 1)


def _channels(
    module: nn.Module, trained: Mapping[str, str], normal: Tensor, grads: Tensor
) -> Block:
    shape = (*grads.shape[:2], -1)
    return _columns(module, trained, normal.reshape(shape), grads.reshape(shape), 2)


def _columns(
    module: nn.Module, trained: Mapping[str, str], normal: Tensor, grads: Tensor, positions: int
) -> Block:
    columns = []
    if "weight" in trained:
        columns.append((grads * normal).sum(positions))
    if "bias" in trained:
        columns.append(grads.sum(positions))
    values = torch.stack(columns, dim=2) if len(columns) == 2 else columns[0]
    return DenseBlock(values.to(dtype_of(module, trained)))


def _wide(values: Tensor) -> Tensor:
    """Return half precision as float32: sums over positions run in no fewer bits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
