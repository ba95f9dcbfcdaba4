"""``dattri check NAME``: the conformance laws of a part, a method, or all that a plugin names."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from attrs import frozen

from dattri_core.cli.names import every_name, named
from dattri_core.entries import load_target
from dattri_core.errors import PluginError, SpecError, nearest
from dattri_core.registry import Registry, default_registry

# By name, since nothing in the core imports the laws.
CHECK = "dattri_core.laws:check"
CHECK_PLUGIN = "dattri_core.laws:check_plugin"


@frozen
class Check:
    """The command ``dattri check``."""

    help: str = "Run the conformance laws of a part, a method, or a plugin's whole distribution."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments."""
        parser.add_argument(
            "name", help="a method, a part (or 'kind:name'), a plugin or a distribution"
        )

    def run(self, args: argparse.Namespace) -> int:
        """Print a report for each name; 1 when a law fails or none was run."""
        passed = True
        for report in _reports(default_registry(), args.name):
            print(report, flush=True)
            passed = passed and bool(report.ok)
        print(f"dattri check {args.name}: {'passed' if passed else 'FAILED'}")
        return 0 if passed else 1


def _reports(registry: Registry, name: str) -> Iterable[Any]:
    found = named(registry, name)
    if found:
        check = load_target(CHECK)
        return (check(entry.kind, entry.name) for entry in found)
    owners = [p for p in registry.plugins if name in (p.origin.plugin, p.origin.distribution)]
    if owners and all(plugin.status != "loaded" for plugin in owners):
        plugin = owners[0]  # of several, those that are broken are reports of their own
        raise PluginError(f"plugin {plugin.origin} is {plugin.status}: {plugin.error}")
    if not owners:
        known = {n for p in registry.plugins for n in (p.origin.plugin, p.origin.distribution)}
        raise SpecError(
            f"no method, part or plugin {name!r}; "
            f"{nearest(name, {*every_name(registry), *known} - {''})}{registry.broken_note}"
        )
    reports: Iterable[Any] = load_target(CHECK_PLUGIN)(name)
    return reports


command = Check()
