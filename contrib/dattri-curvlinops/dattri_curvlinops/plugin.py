"""What this distribution adds: one curvature and one method."""

from __future__ import annotations

import dattri_core as dattri

dattri_api_version = 1


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "curvature",
        "curvlinops",
        "dattri_curvlinops.curvature:Curvlinops",
        "A linear operator of the library curvlinops: GGN, Hessian, empirical Fisher, (E)K-FAC",
    )
    registry.method(
        "if-curvlinops",
        {
            "source": "per-example",
            "inverse_hessian": {"curvature": "curvlinops", "solver": "cg"},
        },
        summary="Influence function with a curvature of curvlinops, the GGN by default",
        formula="S_ij = mean_c <g_i, (H + damping I)^-1 h_j>, H the operator of curvlinops",
        citation="Dangel et al. 2025, Position: Curvature Matrices Should Be Democratized via "
        "Linear Operators (arXiv 2501.19183)",
    )
