"""Batched matrix products that share an operand, as one larger product."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dattri_core.dispatched import DispatchMode

NARROW = 32
"""Outputs up to which one wide product beats a batch of narrow ones, in spite of its strides."""
LARGE = 10**8
"""Products of an entry of a vector with an example in a step, from which the mode pays."""


def shared_operands(
    vectors: Mapping[str, Tensor], slice_vectors: int, slice_examples: int
) -> AbstractContextManager[Any]:
    """Return `SharedOperands` where a step is large and most of it is of narrow layers.

    Elsewhere it would only cost: every operation passes through it, which for a small step takes
    as long as the step.

    Args:
        vectors: By parameter name, ``[C, *parameter shape]``.
        slice_vectors: How many of them a step takes.
        slice_examples: How many examples a step takes.
    """
    if any(value.device.type != "cpu" for value in vectors.values()):
        return nullcontext()
    sizes = {name: value[0].numel() for name, value in vectors.items() if len(value)}
    narrow = sum(
        size
        for name, size in sizes.items()
        if vectors[name].dim() == 3 and vectors[name].shape[1] <= NARROW
    )
    whole = sum(sizes.values())
    large = slice_vectors * slice_examples * whole >= LARGE
    return SharedOperands() if large and 2 * narrow > whole else nullcontext()


class SharedOperands(DispatchMode):
    """While entered, ``bmm`` on the CPU spares work where the whole batch shares an operand.

    With many tangents V_c at one activation X, vmap asks for ``X V_c`` as a batch over c with X
    repeated. For layers with few outputs the libraries run that as C narrow products;
    ``X [V_1 ... V_C]`` is one wide product, two to three times as fast. The numbers are equal up to
    rounding.
    """

    def __init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, or its replacement."""
        if func is torch.ops.aten.bmm.default and args[0].device.type == "cpu":
            left, right = args
            if _is_shared(left) and right.shape[2] <= NARROW:
                return _wide_left(left[0], right)
            if _is_shared(right) and left.shape[1] <= NARROW:
                return _wide_right(left, right[0])
        return func(*args, **(kwargs or {}))


def _is_shared(batch: Tensor) -> bool:
    return batch.shape[0] > 1 and batch.stride(0) == 0


def _wide_right(left: Tensor, right: Tensor) -> Tensor:
    """Return each of ``left [C, O, N]`` times ``right [N, D]``, ``[C, O, D]``."""
    count, outputs, inner = left.shape
    tall = left.reshape(count * outputs, inner)
    return torch.mm(tall, right).reshape(count, outputs, right.shape[1])


def _wide_left(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left [N, D]`` times each of ``right [C, D, O]``, ``[C, N, O]`` with O before N."""
    count, width, outputs = right.shape
    # Free of copies when each right is the transpose of a row-major matrix, as a weight's tangent.
    tall = right.mT.reshape(count * outputs, width)
    return torch.mm(tall, left.mT).reshape(count, outputs, len(left)).mT
