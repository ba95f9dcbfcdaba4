"""The command that writes a new plugin."""

from __future__ import annotations

import dattri_core as dattri


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name it; nothing is imported until it is used."""
    registry.part(
        "command",
        "new-plugin",
        "dattri_scaffold.command:command",
        "Write an installable plugin: a part, a method, tests, laws and CI, all of which pass",
    )
