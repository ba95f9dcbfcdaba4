"""Benchmarks: every method by every metric in one setting."""

from __future__ import annotations

import dattri_core as dattri


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "command",
        "bench",
        "dattri_bench.command:command",
        "Measure methods by metrics over seeds; prints a table, writes it and its figure",
    )
