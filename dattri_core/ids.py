"""Ids: names of examples that go with them through slices, files and tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dattri_core.errors import InputError

Id: TypeAlias = int | str
Ids: TypeAlias = Sequence[Id]
"""One id for each example: a range of positions, or a tuple."""


def as_ids(ids: Any, count: int, side: str) -> Ids:
    """Return one plain int or str for each example; None stands for the positions.

    Raises:
        InputError: Another number of ids than examples, a repeated id, or one that is neither an
            int nor a str.
    """
    if ids is None:
        return range(count)
    if isinstance(ids, range) and len(ids) == count:
        return ids if ids == range(count) else tuple(ids)
    if isinstance(ids, str) or not hasattr(ids, "__len__"):
        raise InputError(f"{side} ids: got {ids!r}; give a sequence of {count} ints or strings")
    if len(ids) != count:
        raise InputError(f"{side} ids: got {len(ids)} ids for {count} {side} examples")
    plain = tuple(ids.tolist()) if isinstance(ids, (np.ndarray, Tensor)) else tuple(map(_item, ids))
    for item in plain:
        if type(item) not in (int, str):
            raise InputError(
                f"{side} ids: {item!r} is a {type(item).__name__}; an id is an int or a string"
            )
    if len(set(plain)) != count:
        seen: set[Id] = set()
        repeated = next(item for item in plain if item in seen or seen.add(item))  # type: ignore[func-returns-value]
        raise InputError(f"{side} ids: {repeated!r} names two examples; ids must differ")
    return plain


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, (np.generic, Tensor)) else value


def id_array(ids: Sequence[Id], positions: Tensor) -> np.ndarray[Any, Any]:
    """Return the ids at positions of any shape, as an array of that shape."""
    if isinstance(ids, range):
        return np.asarray(positions)
    same_kind = any(all(type(i) is kind for i in ids) for kind in (str, int))
    table = np.array(list(ids), dtype=None if same_kind else object)
    return np.asarray(table[positions.numpy()])


def positions_of(ids: Ids, wanted: Sequence[Id], side: str) -> list[int]:
    """Return the position of each wanted id.

    Raises:
        InputError: An id that no example has; a few that exist are named.
    """
    plain = [_item(item) for item in wanted]
    table: Any = ids if isinstance(ids, range) else {item: at for at, item in enumerate(ids)}
    for item in plain:
        if type(item) not in (int, str) or item not in table:
            shown = ", ".join(repr(i) for i in ids[:5])
            raise InputError(
                f"{side} ids: no {side} example has the id {item!r}; "
                f"{len(ids)} ids: {shown}{', ...' if len(ids) > 5 else ''}"
            )
    return [table.index(item) if isinstance(ids, range) else table[item] for item in plain]


def select_axis(chosen: Any, ids: Ids, side: str) -> tuple[slice | Tensor, Ids]:
    """Return a selection of positions as a slice with a positive step or an index, and its ids.

    Args:
        chosen: An int, a slice, a sequence, array or tensor of positions, or a mask.
        ids: The ids of the axis.
        side: ``"train"`` or ``"test"``, for errors.

    Raises:
        InputError: A position outside the axis, or a mask of another length.
    """
    count = len(ids)
    if isinstance(chosen, slice):
        span = range(*chosen.indices(count))
        if span.step > 0:
            return chosen, tuple(ids[chosen])
        index = torch.tensor(list(span), dtype=torch.long)
    else:
        index = _index(chosen, count, side)
    return index, tuple(ids[position] for position in index.tolist())


def _index(chosen: Any, count: int, side: str) -> Tensor:
    what = f"{side} positions"
    try:
        index = torch.as_tensor(chosen).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{what}: got {chosen!r}; give ints, slices, arrays of positions, or masks; "
            "use .select(...) for ids"
        ) from error
    if index.dim() > 1:
        raise InputError(f"{what}: got an array of shape {tuple(index.shape)}; give one axis")
    if index.dtype == torch.bool:
        if tuple(index.shape) != (count,):
            raise InputError(
                f"{what}: the mask has shape {tuple(index.shape)}, expected one entry for each of "
                f"{count} examples"
            )
        return index.nonzero().flatten()
    index = index.reshape(-1)
    if index.numel() == 0:
        return index.long()
    if index.is_floating_point() or index.is_complex():
        raise InputError(f"{what}: got {index.dtype} numbers; positions are whole numbers")
    index = index.long()
    low, high = int(index.min()), int(index.max())
    if low < -count or high >= count:
        raise InputError(
            f"{what}: position {low if low < -count else high} lies outside of {count} examples"
        )
    return index
