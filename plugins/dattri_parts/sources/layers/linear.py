"""Linear layers: ``torch.nn.Linear`` and Hugging Face's ``Conv1D``, which stores W transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from attrs import frozen
from torch import Tensor, nn

from dattri_core import Block, BlockSpec
from dattri_parts.sources.layers.affine import affine_rows, affine_spec


@frozen
class LinearRule:
    """``nn.Linear``: dL/dW = sum_t g_t x_t^T, dL/db = sum_t g_t; weight ``[O, I]``."""

    leading: ClassVar[bool] = False

    def spec(self, name: str, module: nn.Module, trained: Mapping[str, str]) -> BlockSpec | None:
        """Return the outer block (O, I), bias as last column."""
        outputs, inputs = _size(module, "out_features"), _size(module, "in_features")
        return affine_spec(name, outputs, inputs, module, trained)

    def rows(
        self, module: nn.Module, trained: Mapping[str, str], inputs: Tensor, grads: Tensor
    ) -> Block:
        """Return the factors over all positions of an example."""
        return affine_rows(module, trained, _positions(inputs), _positions(grads))


@frozen
class TransposedLinearRule:
    """``transformers.pytorch_utils.Conv1D``: y = x W + b with weight ``[I, O]``."""

    leading: ClassVar[bool] = False

    def spec(self, name: str, module: nn.Module, trained: Mapping[str, str]) -> BlockSpec | None:
        """Return the outer block (O, I), bias as last column."""
        inputs, outputs = module.get_parameter("weight").shape
        return affine_spec(name, outputs, inputs, module, trained, transposed=True)

    def rows(
        self, module: nn.Module, trained: Mapping[str, str], inputs: Tensor, grads: Tensor
    ) -> Block:
        """Return the factors over all positions of an example."""
        return affine_rows(module, trained, _positions(inputs), _positions(grads))


def _size(module: nn.Module, name: str) -> int:
    return int(getattr(module, name))


def _positions(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1, values.shape[-1])
