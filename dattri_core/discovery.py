"""Discovery: which plugins are installed; each is loaded on its own, so that none stops another."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Literal, TypeVar

import pluggy
from attrs import evolve, field, frozen

import dattri_core.hookspecs as hookspecs
from dattri_core.errors import PluginError, nearest
from dattri_core.hookspecs import API_VERSION, EVENTS, HOOKS, PROJECT

GROUP = "dattri"
SELECTION = "DATTRI_PLUGINS"
R = TypeVar("R")


@frozen
class Origin:
    """Who named something: a plugin, and the distribution that brought it."""

    plugin: str
    distribution: str = ""
    version: str = ""

    def __str__(self) -> str:
        owner = f"{self.distribution} {self.version}".strip()
        return f"{owner} (plugin {self.plugin!r})" if owner else self.plugin


@frozen
class Plugin:
    """One plugin as found: loaded, turned off, or broken with the error that it raised."""

    origin: Origin
    target: str
    status: Literal["loaded", "off", "broken"]
    error: str = ""
    traceback: str = field(default="", repr=False)
    listeners: Mapping[str, Callable[..., Any]] = field(factory=dict, repr=False, eq=False)


@frozen
class Candidate:
    """An entry point that has not been loaded."""

    entry_point: EntryPoint
    origin: Origin


def find_candidates() -> list[Candidate]:
    """Return the entry points of the group ``dattri``, in the order of their distributions."""
    found = []
    for entry_point in entry_points(group=GROUP):
        distribution, version = "", ""
        if entry_point.dist is not None:
            metadata = entry_point.dist.metadata
            distribution = metadata["Name"] or ""
            version = metadata["Version"] or ""
        found.append(Candidate(entry_point, Origin(entry_point.name, distribution, version)))
    return sorted(found, key=lambda c: (c.origin.distribution, c.origin.plugin))


def select(
    candidates: Iterable[Candidate], selection: str | None
) -> tuple[list[Candidate], list[Plugin]]:
    """Return the candidates to load, and a record for each that is turned off or does not exist.

    Args:
        candidates: What is installed.
        selection: ``"a,b"``: only these; ``"-a"``: all but a; None: all. A name is that of a plugin
            or of a distribution.
    """
    candidates = list(candidates)
    if selection is None:
        return candidates, []
    words = [word.strip() for word in selection.split(",") if word.strip()]
    off = [word[1:] for word in words if word.startswith("-")]
    only = [word for word in words if not word.startswith("-")]
    records = []
    known = {name for c in candidates for name in (c.origin.plugin, c.origin.distribution) if name}
    for name in (*off, *only):
        if not any(_is_named(c, [name]) for c in candidates):
            message = f"{SELECTION} names {name!r}, which is not installed; {nearest(name, known)}"
            records.append(Plugin(Origin(name), "", "broken", message))
    chosen = []
    for candidate in candidates:
        wanted = (not only or _is_named(candidate, only)) and not _is_named(candidate, off)
        # An empty selection means none at all: "only these", and there are none.
        if wanted and words:
            chosen.append(candidate)
        else:
            target = candidate.entry_point.value
            records.append(Plugin(candidate.origin, target, "off", f"turned off by {SELECTION}"))
    return chosen, records


def discover(new_registry: Callable[[Origin], R]) -> list[tuple[Plugin, R | None]]:
    """Load every selected plugin into a registry of its own; None for one that is broken or off."""
    chosen, records = select(find_candidates(), os.environ.get(SELECTION))
    loaded: list[tuple[Plugin, R | None]] = [(record, None) for record in records]
    for candidate in chosen:
        own = new_registry(candidate.origin)
        plugin = load(candidate, own)
        loaded.append((plugin, own if plugin.status == "loaded" else None))
    return loaded


def load(candidate: Candidate, registry: object) -> Plugin:
    """Import one plugin and let it register; whatever it raises is recorded, not passed on."""
    record = Plugin(candidate.origin, candidate.entry_point.value, "loaded")
    try:
        module = candidate.entry_point.load()
        listeners = admit(module, candidate.origin.plugin, registry)
    except (Exception, SystemExit) as error:
        # A plugin is foreign code: any failure of its own must leave the others standing.
        message = f"{type(error).__name__}: {_one_line(error)}"
        return evolve(record, status="broken", error=message, traceback=traceback.format_exc())
    return evolve(record, listeners=listeners)


def admit(
    module: ModuleType | object, name: str, registry: object
) -> dict[str, Callable[..., Any]]:
    """Check the hooks of a plugin, run its `register`, and return its callers of run events.

    Raises:
        PluginError: A hook is misspelt or absent, or the plugin needs a newer API.
    """
    wanted = getattr(module, "dattri_api_version", API_VERSION)
    if not isinstance(wanted, int) or wanted > API_VERSION:
        raise PluginError(
            f"it is written for version {wanted!r} of the plugin API and this dattri-core has "
            f"version {API_VERSION}; upgrade dattri-core, or install an older release of the plugin"
        )
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(module, name)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{error}; valid hooks: {', '.join(HOOKS)}") from error
    callers = {caller.name for caller in manager.get_hookcallers(module) or ()}
    if not callers:
        raise PluginError(f"it has no hook; mark one of {', '.join(HOOKS)} with @dattri.hookimpl")
    manager.hook.register(registry=registry)
    return {event: getattr(manager.hook, event) for event in EVENTS if event in callers}


def _is_named(candidate: Candidate, names: Iterable[str]) -> bool:
    own = {_plain(candidate.origin.plugin), _plain(candidate.origin.distribution)}
    return any(_plain(name) in own for name in names)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
