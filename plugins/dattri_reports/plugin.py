"""Reports: what a run prints and draws."""

from __future__ import annotations

import dattri_core as dattri


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "command",
        "demo",
        "dattri_reports.demo:command",
        "Find wrong labels in real data with every method; prints a table, writes a report",
    )
    registry.part(
        "command",
        "report",
        "dattri_reports.joined:command",
        "Join the results of benchmarks and studies into one HTML page",
    )
