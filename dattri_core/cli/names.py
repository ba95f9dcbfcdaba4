"""Names on the command line: a method, a part (``kind:name`` where several kinds have it)."""

from __future__ import annotations

from dattri_core.entries import KINDS, METHOD, Entry, Recipe
from dattri_core.errors import SpecError, nearest
from dattri_core.registry import Registry


def named(registry: Registry, text: str) -> list[Entry | Recipe]:
    """Return what a name may stand for: all kinds of part and methods that have it.

    Raises:
        SpecError: No such kind.
        PluginError: Two plugins claim the name.
    """
    kind, _, name = text.rpartition(":")
    if kind and kind not in (*KINDS, METHOD):
        raise SpecError(f"no kind of part {kind!r}; {nearest(kind, (*KINDS, METHOD))}")
    kinds = [kind] if kind else [METHOD, *KINDS]
    return [find(registry, k, name) for k in kinds if name in registry.names(k)]


def find(registry: Registry, kind: str, name: str) -> Entry | Recipe:
    """Return the method or part of a kind and a name."""
    return registry.recipe(name) if kind == METHOD else registry.entry(kind, name)


def every_name(registry: Registry) -> list[str]:
    """Return what `named` knows, for messages."""
    return sorted({entry.name for entry in registry.entries()})
