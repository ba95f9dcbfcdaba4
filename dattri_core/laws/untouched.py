"""What a part leaves as it was: itself, and the rows that it is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from dattri_core.laws.law import require, require_identical
from dattri_core.rows import Rows

NAMED = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
"""What is the same thing or another, whatever it holds."""


def require_frozen(bench: Any, use: Callable[[Any, bool], Tensor]) -> None:
    """Raise `LawBroken` where a part can be changed, or has changed after its use on other data.

    Args:
        bench: Holds the part as ``bench.part``.
        use: Uses a bench on the data of the law, or on other data where the second is true, and
            returns numbers.
    """
    require_fixed(bench.part)
    before = contents(bench.part)
    never, used = (attrs.evolve(bench, part=copy.deepcopy(bench.part)) for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        want = _seeded(use, never, False)
        _seeded(use, used, True)
        got = _seeded(use, used, False)
    require_identical(got, want, "numbers after a use on other data")
    require(contents(used.part) == before, "its fields have changed after it was used")


def _seeded(use: Callable[[Any, bool], Tensor], bench: Any, other: bool) -> Tensor:
    """Return the numbers of a use, from the same global random state each time."""
    torch.manual_seed(0)
    return use(bench, other)


def require_fixed(part: Any) -> None:
    """Raise `LawBroken` where an attribute of a part can be set."""
    held = [a.name for a in attrs.fields(type(part))] if attrs.has(type(part)) else []
    name = next(iter([*held, *getattr(part, "__dict__", ())]), "")
    try:
        setattr(part, name or "_set_by_a_law", getattr(part, name) if name else None)
    except (AttributeError, TypeError):
        return
    if not name:
        delattr(part, "_set_by_a_law")
    what = f"its field {name!r}" if name else "an attribute"
    require(False, f"{what} can be set: a part is frozen, make its class with @attrs.frozen")


def contents(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Return all that a value holds, to be compared with the same later."""
    if id(value) in above or isinstance(value, NAMED):
        return id(value)
    above = (*above, id(value))
    if isinstance(value, Tensor):
        return ("tensor", str(value.dtype), value.detach().cpu().tolist())
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.tolist())
    if isinstance(value, Mapping):
        return [(repr(key), contents(item, above)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [contents(item, above) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    cls = type(value)
    names = [a.name for a in attrs.fields(cls)] if attrs.has(cls) else []
    names += [n for n in getattr(value, "__dict__", ()) if not _derived(cls, n)]
    if not names:
        return repr(value) if any("__repr__" in vars(c) for c in cls.__mro__[:-1]) else id(cls)
    return (id(cls), [(n, contents(getattr(value, n), above)) for n in dict.fromkeys(names)])


def _derived(cls: type, name: str) -> bool:
    """Return whether an entry is one of a cached property: made from the fields."""
    return isinstance(getattr(cls, name, None), cached_property)


def require_rows_untouched(rows: Rows, use: Callable[[Rows], object], what: str) -> None:
    """Raise `LawBroken` unless rows are, after a use, bit for bit what they were before."""
    before = rows.flat().clone(), rows.index.clone()
    aux = {name: numbers.clone() for name, numbers in rows.aux.items()}
    use(rows)
    require_identical(rows.flat(), before[0], f"rows given to {what}, afterwards")
    require_identical(rows.index, before[1], f"index given to {what}, afterwards")
    for name, numbers in aux.items():
        require_identical(rows.aux[name], numbers, f"aux {name!r} given to {what}, afterwards")


def require_dtype(got: torch.dtype, want: torch.dtype, what: str) -> None:
    """Raise `LawBroken` unless a result has the dtype of the rows that it is made of."""
    require(got == want, f"{what}: {got} for rows of {want}; give rows in the dtype they came in")
