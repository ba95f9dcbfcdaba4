"""Benchmarks and ablation studies: methods by metrics in settings."""

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
    registry.part(
        "command",
        "ablate",
        "dattri_bench.studies.command:command",
        "Run an ablation study: a plan over parts, fields, settings, metrics and seeds",
    )
