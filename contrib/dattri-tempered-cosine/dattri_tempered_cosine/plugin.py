"""What this distribution adds: one scorer and one method."""

from __future__ import annotations

import dattri_core as dattri

dattri_api_version = 1


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "scorer",
        "tempered-cosine",
        "dattri_tempered_cosine.scorer:TemperedCosine",
        "Inner product over a power of the norms: between dot and cosine",
    )
    registry.method(
        "grad-tempered-cos",
        {"source": "per-example", "scorer": "tempered-cosine", "fold": "mean"},
        summary="Gradient similarity that damps large gradients without levelling them",
        formula="S_ij = mean_c <g_i, h_j> / (|g_i|^p |h_j|^q), p = q = 1/2",
        citation="dattri-tempered-cosine; dividing by the train norm after Barshan et al. 2020, "
        "RelatIF (arXiv 2003.11630)",
    )
