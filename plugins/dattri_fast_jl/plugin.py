"""The projector of the package fast_jl, for comparisons."""

from __future__ import annotations

import dattri_core as dattri


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name it; nothing is imported until it is used."""
    registry.part(
        "projector",
        "fast-jl",
        "dattri_fast_jl.projector:FastJL",
        "The signs of the package fast_jl, whose matrix depends on the GPU; for comparisons",
    )
