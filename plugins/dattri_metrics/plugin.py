"""Metrics: how good scores are."""

from __future__ import annotations

import dattri_core as dattri


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "metric",
        "mislabel-auroc",
        "dattri_metrics.mislabel:auroc",
        "How well self-influence ranks wrongly labelled train examples first",
    )
