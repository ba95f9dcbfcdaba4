"""The tensors of a block that are its rows' own, and the same block made of other tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import attrs
from torch import Tensor

from dattri_core.blocks.block import Block
from dattri_core.blocks.inputs import OneHot, Shared

B = TypeVar("B", bound=Block)


def map_tensors(block: B, function: Callable[[Tensor], Tensor]) -> B:
    """Return a block with each tensor replaced; they are visited in one order every time.

    What many blocks hold in common, as the base of a span, is left as it is.
    """
    made: B = _mapped(block, function)
    return made


def _mapped(held: Any, function: Callable[[Tensor], Tensor]) -> Any:
    changed: dict[str, Any] = {}
    for field in attrs.fields(type(held)):
        value = getattr(held, field.name)
        if isinstance(value, Tensor):
            changed[field.alias] = function(value)
        elif isinstance(value, (OneHot, Shared)):
            changed[field.alias] = _mapped(value, function)
        elif isinstance(value, tuple) and value and isinstance(value[0], Block):
            changed[field.alias] = tuple(_mapped(part, function) for part in value)
    return attrs.evolve(held, **changed)
