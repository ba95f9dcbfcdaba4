"""Arguments and results of modules: any nest of tensors, taken apart and put together again.

The recursion is over module-level functions: a closure that calls itself is a reference cycle,
which would keep every tensor it saw alive until the garbage collector runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen
from torch import Tensor


@frozen
class Slot:
    """The place of tensor ``at`` in a nest."""

    at: int


def pull(nest: Any) -> tuple[list[Tensor], Any]:
    """Return the tensors of a nest and the nest with slots in their places.

    A tensor that appears twice is returned once: ``attention(x, x, x)`` looks at identity.
    """
    if isinstance(nest, Tensor):
        return [nest], Slot(0)
    tensors: list[Tensor] = []
    return tensors, _pull(nest, tensors)


def push(skeleton: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the nest with tensors in the places of its slots."""
    if isinstance(skeleton, Slot):
        return tensors[skeleton.at]
    return _rebuild(skeleton, push, tensors)


def _pull(value: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return _rebuild(value, _pull, tensors)
    for at, seen in enumerate(tensors):
        if seen is value:
            return Slot(at)
    tensors.append(value)
    return Slot(len(tensors) - 1)


def _rebuild(value: Any, visit: Callable[[Any, Any], Any], tensors: Any) -> Any:
    if type(value) is dict:
        return {key: visit(item, tensors) for key, item in value.items()}
    if isinstance(value, Mapping) and hasattr(value, "__setitem__"):  # Hugging Face's ModelOutput
        other: Any = copy.copy(value)
        for key, item in value.items():
            other[key] = visit(item, tensors)
        return other
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        # Not by its own constructor, which may look at what it is given (a `PackedSequence` does).
        return tuple.__new__(type(value), [visit(item, tensors) for item in value])
    if isinstance(value, (tuple, list)):
        return type(value)(visit(item, tensors) for item in value)
    return value
