"""Whose parts a method or a metric is made of: another release of a plugin gives other numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from dattri_core import default_registry

OWN = "dattri-core"
"""The distribution whose version is in the identity of every world."""


def foreign_parts(made: Any) -> dict[str, dict[str, str]]:
    """Return ``{"parts": {"scorer held-back": "NAME 0.2.0 (plugin 'held_back')"}}``.

    Parts, at any depth, of distributions other than dattri-core, by kind and name, with who brought
    them; empty where there are none, so that what is made of dattri-core alone is said as ever.
    What is changed under the version that it had is not told apart.

    Args:
        made: A method, an attributor or a metric.
    """
    found: dict[str, str] = {}
    registry = default_registry()
    for part in _parts(made):
        named = registry.name_of(part)
        if named is not None:
            origin = registry.entry(*named).origin
            if origin.distribution not in ("", OWN):  # "": named in this process, by no release
                found[" ".join(named)] = str(origin)
    return {"parts": dict(sorted(found.items()))} if found else {}


def _parts(value: Any) -> Iterator[Any]:
    """Yield a value and all that its fields hold, at any depth, where it has fields."""
    if isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, Mapping):
        yield from _parts(list(value.values()))
    elif attrs.has(type(value)):
        yield value
        for field in attrs.fields(type(value)):
            yield from _parts(getattr(value, field.name))
