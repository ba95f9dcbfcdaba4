"""Baselines that every table needs."""

from __future__ import annotations

import dattri_core as dattri


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "attributor",
        "random",
        "dattri_baselines.random:Random",
        "Independent standard normal scores",
    )
    registry.method(
        "random",
        {"attributor": "random"},
        summary="Independent standard normal scores: what chance gives",
        formula="S_ij ~ N(0, 1), independent, a function of the seed and of (i, j)",
        citation="None: the chance level of every table",
    )
