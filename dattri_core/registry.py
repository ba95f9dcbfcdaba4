"""The registry: what plugins named, each a "module:attr" string until it is used."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import attrs

from dattri_core import describe, fields
from dattri_core.discovery import Origin, Plugin, discover
from dattri_core.entries import (
    KINDS,
    LOCAL,
    METHOD,
    Entry,
    Recipe,
    clash_message,
    load_target,
    spell_kind,
)
from dattri_core.errors import PluginError, SpecError, nearest
from dattri_core.hookspecs import API_VERSION

BuildPart = Callable[[str, Any], Any]


class Registry:
    """Names of parts and methods. ``Registry()`` is empty; `default_registry` holds the plugins'.

    Args:
        origin: Who registers what is registered here directly.
    """

    api_version = API_VERSION

    def __init__(self, origin: Origin = LOCAL) -> None:
        self._origin = origin
        self._named: dict[tuple[str, str], list[Entry | Recipe]] = {}
        self._targets: dict[str, Entry] | None = None  # of parts, made when it is asked for
        self._plugins: list[Plugin] = []
        self._deaf: set[Origin] = set()

    # --- what a plugin calls --------------------------------------------------------------------
    def part(self, kind: str, name: str, target: str, summary: str = "") -> None:
        """Name a part; nothing is imported.

        Args:
            kind: One of `KINDS`.
            name: How specs and users call it, unique within its kind.
            target: ``"module:attr"`` of the class; or of a value, of which fields can be set
                where its class is an attrs class.
            summary: One line for ``dattri parts``.

        Raises:
            PluginError: Kind, name or target are malformed, or this plugin used the name already.
        """
        if kind not in KINDS:
            raise PluginError(f"register: no kind of part {kind!r}; {nearest(str(kind), KINDS)}")
        if not isinstance(target, str) or not re.fullmatch(r"[\w.]+:[\w.]+", target):
            raise PluginError(
                f"register {kind} {name!r}: target {target!r} is not 'module:attr', the place of "
                "the class as text"
            )
        self._add(Entry(kind, name, self._origin, target, summary))

    def method(
        self, name: str, spec: Mapping[str, Any], *, summary: str, formula: str, citation: str
    ) -> None:
        """Name a method: parts by name, and their fields.

        Args:
            name: How users call it.
            spec: Slots ``source``, ``projector``, ``inverse_hessian``, ``scorer``, ``fold``, each a
                name or ``{"name": ..., fields}``; or ``{"attributor": ...}``.
            summary: What it is, in one line.
            formula: Of the score, positive where the train example helps.
            citation: Where it was published.

        Raises:
            PluginError: The name is malformed or used already, or the spec is no mapping.
        """
        if not isinstance(spec, Mapping):
            raise PluginError(
                f"register method {name!r}: the spec is a {type(spec).__name__}, expected a mapping"
            )
        self._add(Recipe(name, self._origin, copy.deepcopy(dict(spec)), summary, formula, citation))

    def _add(self, entry: Entry | Recipe) -> None:
        if not isinstance(entry.name, str) or not re.fullmatch(r"[\w.\-]+", entry.name):
            raise PluginError(
                f"register {entry.kind} {entry.name!r}: a name is letters, digits, '-', '_' and '.'"
            )
        key = (entry.kind, entry.name)
        if key in self._named:
            raise PluginError(f"register: {entry.kind} {entry.name!r} is registered twice")
        self._named[key] = [entry]
        self._targets = None

    def merge(self, other: Registry) -> None:
        """Take over the names of another registry; a name that both have becomes a clash."""
        for key, entries in other._named.items():
            self._named.setdefault(key, []).extend(entries)
        self._targets = None

    # --- what it holds --------------------------------------------------------------------------
    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """Return every plugin that was found: loaded, off or broken."""
        return tuple(self._plugins)

    @property
    def clashes(self) -> tuple[str, ...]:
        """Return one message for each name that two plugins claim."""
        return tuple(clash_message(found) for found in self._named.values() if len(found) > 1)

    def names(self, kind: str) -> list[str]:
        """Return the names of one kind of part, or of the methods (kind ``"method"``)."""
        return sorted(name for its_kind, name in self._named if its_kind == kind)

    def entry(self, kind: str, name: str) -> Entry:
        """Return the part of a name. Raises `SpecError`, or `PluginError` on a clash."""
        found = self._find(kind, name)
        assert isinstance(found, Entry)
        return found

    def recipe(self, name: str) -> Recipe:
        """Return the method of a name. Raises `SpecError`, or `PluginError` on a clash."""
        found = self._find(METHOD, name)
        assert isinstance(found, Recipe)
        return found

    def entries(self, origin: Origin | None = None) -> list[Entry | Recipe]:
        """Return all names, or those of one plugin, by kind and name; clashing ones each."""
        found = [entry for key in sorted(self._named) for entry in self._named[key]]
        return [entry for entry in found if origin is None or entry.origin == origin]

    def entries_of(self, kind: str) -> list[Entry]:
        """Return the parts of one kind by name; clashing ones each."""
        return [e for e in self.entries() if isinstance(e, Entry) and e.kind == kind]

    def recipes(self) -> list[Recipe]:
        """Return the methods by name; clashing ones each."""
        return [e for e in self.entries() if isinstance(e, Recipe)]

    def _find(self, kind: str, name: str) -> Entry | Recipe:
        found = self._named.get((kind, name), [])
        if not found:
            raise SpecError(
                f"no {spell_kind(kind)} {name!r}; {nearest(str(name), self.names(kind))}"
                f"{self.broken_note}"
            )
        if len(found) > 1:
            raise PluginError(clash_message(found))
        return found[0]

    @property
    def problems(self) -> tuple[str, ...]:
        """Return one message for each plugin that failed to load."""
        return tuple(f"{p.origin}: {p.error}" for p in self._plugins if p.status == "broken")

    @property
    def broken_note(self) -> str:
        """Return the end of a 'no such name' message: the plugins that might have had it."""
        if not self._plugins:
            return (
                "; no plugin is found, not even those of dattri-core: it is imported from a folder "
                "and not installed; pip install it"
            )
        return f"; plugins that failed to load: {'; '.join(self.problems)}" if self.problems else ""

    # --- use ------------------------------------------------------------------------------------
    def resolve(self, kind: str, name: str) -> Any:
        """Import and return what a name stands for.

        Raises:
            SpecError: No such name; the nearest ones are offered, broken plugins shown.
            PluginError: Two plugins claim the name, or its target cannot be imported.
        """
        entry = self.entry(kind, name)
        try:
            return load_target(entry.target)
        except Exception as error:
            raise PluginError(
                f"{spell_kind(kind)} {name!r} of {entry.origin}: {entry.target!r} cannot be "
                f"imported ({type(error).__name__}: {error})"
            ) from error

    def make(self, kind: str, name: str, /, **values: Any) -> Any:
        """Return a part: its class called with the given fields, each checked by its annotation.

        What is named may also be a value of an attrs class: the fields given are changed in it.

        Raises:
            SpecError: No such name or field, or a value of the wrong type.
        """
        return self.make_with(kind, name, values, self._nested)

    def make_with(
        self, kind: str, name: str, values: Mapping[str, Any], build_part: BuildPart
    ) -> Any:
        """Return a part as `make` does; ``build_part`` makes the parts that it is made of."""
        found = self.resolve(kind, name)
        label = f"{spell_kind(kind)} {name!r}"
        if isinstance(found, type):
            if not attrs.has(found):
                raise PluginError(f"{label}: {found.__name__} is no attrs class; use @attrs.frozen")
            return fields.build(found, values, label, build_part)
        if values and attrs.has(type(found)):
            return fields.changed(found, values, label, build_part)
        if values:
            raise SpecError(f"{label}: takes no fields, got {', '.join(map(repr, values))}")
        return found

    def _nested(self, kind: str, value: Any) -> Any:
        if isinstance(value, str):
            return self.make(kind, value)
        if isinstance(value, Mapping) and "name" in value:
            return self.make(kind, value["name"], **{k: v for k, v in value.items() if k != "name"})
        return value

    def name_of(self, part: object) -> tuple[str, str] | None:
        """Return (kind, name) of a part that is registered, or None."""
        cls = part if isinstance(part, type) else type(part)
        if self._targets is None:
            parts = [e for found in self._named.values() for e in found if isinstance(e, Entry)]
            by_name = sorted(parts, key=lambda e: e.name, reverse=True)
            self._targets = {entry.target: entry for entry in by_name}  # the first name counts
        found = self._targets.get(f"{cls.__module__}:{cls.__qualname__}")
        if found is not None:
            return found.kind, found.name
        for target, entry in self._targets.items():
            # The target may be another path to the class; a broken one is not this part.
            with suppress(Exception):
                if target.endswith(f":{cls.__qualname__}") and load_target(target) is cls:
                    return entry.kind, entry.name
        return None

    def spec_of(self, part: object) -> dict[str, Any]:
        """Return ``{"name": ..., changed fields}``: plain data from which `make` makes the part.

        Raises:
            SpecError: The part is of a class that is not registered.
        """
        named = self.name_of(part)
        if named is None:
            cls = type(part)
            raise SpecError(
                f"{cls.__name__} is not a registered part; name it with registry.part(kind, name, "
                f"'{cls.__module__}:{cls.__qualname__}')"
            )
        return {"name": named[1], **describe.plain_fields(part, self._describe)}

    def _describe(self, value: object) -> dict[str, Any] | None:
        if not attrs.has(type(value)) or self.name_of(value) is None:
            return None
        return self.spec_of(value)

    def emit(self, event: str, info: Mapping[str, Any]) -> None:
        """Tell every plugin that listens; one that raises gets a warning and no more events."""
        for plugin in self._plugins:
            caller = plugin.listeners.get(event)
            if caller is None or plugin.origin in self._deaf:
                continue
            try:
                caller(info=info)
            except Exception as error:
                self._deaf.add(plugin.origin)
                warnings.warn(
                    f"plugin {plugin.origin}: its hook {event} raised {type(error).__name__}: "
                    f"{error}; it gets no more events in this process",
                    RuntimeWarning,
                    stacklevel=2,
                )

    @classmethod
    def discovered(cls) -> Registry:
        """Return a registry of all installed plugins, each loaded in isolation."""
        registry = cls()
        for plugin, own in discover(cls):
            registry._plugins.append(plugin)
            if own is not None:
                registry.merge(own)
        return registry


_current: list[Registry] = []


def default_registry() -> Registry:
    """Return the registry of the installed plugins, discovered on the first call."""
    if not _current:
        _current.append(Registry.discovered())
    return _current[-1]


@contextmanager
def using(registry: Registry) -> Iterator[Registry]:
    """Make another registry the default one inside the block: one without discovery, say."""
    _current.append(registry)
    try:
        yield registry
    finally:
        _current.pop()
