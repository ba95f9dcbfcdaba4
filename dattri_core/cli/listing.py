"""``dattri methods``, ``dattri parts``, ``dattri plugins``: what there is; imports no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from attrs import frozen

from dattri_core.cli.table import table
from dattri_core.discovery import Plugin
from dattri_core.entries import KINDS, Entry, Recipe
from dattri_core.errors import SpecError, nearest
from dattri_core.registry import Registry, default_registry


@frozen
class Listing:
    """A command that prints a table of what is registered."""

    help: str
    rows: Callable[[Registry, argparse.Namespace], str]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments."""
        self.arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Print the table, and what is amiss on standard error."""
        registry = default_registry()
        print(self.rows(registry, args))
        for problem in (*registry.problems, *registry.clashes):
            print(f"dattri: warning: {problem}", file=sys.stderr)
        return 0


def _methods(registry: Registry, args: argparse.Namespace) -> str:
    recipes = registry.recipes()
    return table(("METHOD", "FROM", "SUMMARY"), [(r.name, _owner(r), r.summary) for r in recipes])


def _parts(registry: Registry, args: argparse.Namespace) -> str:
    kinds = [kind for kind in KINDS if kind != "command"]
    if args.kind is not None and args.kind not in KINDS:
        raise SpecError(f"no kind of part {args.kind!r}; {nearest(args.kind, KINDS)}")
    shown = kinds if args.kind is None else [args.kind]
    rows = [(e.kind, e.name, _owner(e), e.summary) for k in shown for e in registry.entries_of(k)]
    return table(("KIND", "NAME", "FROM", "SUMMARY"), rows)


def _plugins(registry: Registry, args: argparse.Namespace) -> str:
    rows = []
    for plugin in registry.plugins:
        origin = plugin.origin
        owned = registry.entries(origin)
        methods = sum(entry.kind == "method" for entry in owned)
        said = f"{len(owned) - methods} parts, {methods} methods"
        if plugin.listeners:
            said += f", hears {', '.join(plugin.listeners)}"
        rows.append(
            (
                origin.plugin,
                f"{origin.distribution} {origin.version}".strip(),
                plugin.status,
                said if plugin.status == "loaded" else plugin.error,
            )
        )
    text = table(("PLUGIN", "DISTRIBUTION", "STATUS", ""), rows)
    names = [_names(registry, plugin) for plugin in registry.plugins] if args.names else []
    traces = [p.traceback for p in registry.plugins if p.traceback and args.tracebacks]
    return "\n\n".join([text, *filter(None, names), *traces])


def _names(registry: Registry, plugin: Plugin) -> str:
    """Return what a plugin registered, a line for each kind."""
    found: dict[str, list[str]] = {}
    for entry in registry.entries(plugin.origin):
        found.setdefault(entry.kind, []).append(entry.name)
    lines = [f"  {kind}: {', '.join(names)}" for kind, names in found.items()]
    return "\n".join([f"{plugin.origin}:", *lines]) if lines else ""


def _owner(entry: Entry | Recipe) -> str:
    return entry.origin.distribution or entry.origin.plugin


def _kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", help=f"one kind only: {', '.join(KINDS)}")


def _details(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v", "--names", action="store_true", help="list the names that each plugin registered"
    )
    parser.add_argument(
        "--tracebacks", action="store_true", help="show where each broken plugin failed"
    )


methods = Listing("List the methods, each with its plugin and what it is.", _methods)
parts = Listing("List the parts, by kind.", _parts, _kind)
plugins = Listing("List the plugins: loaded, off or broken.", _plugins, _details)
