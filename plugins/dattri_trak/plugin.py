"""TRAK and TrackStar: sketched gradients of margins or of losses."""

from __future__ import annotations

import dattri_core as dattri


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "source",
        "margin",
        "dattri_trak.margin:Margin",
        "Gradients of the margin log(p / (1 - p)) instead of the loss, with the residual 1 - p",
    )
    registry.part(
        "scorer",
        "trak",
        "dattri_trak.scorer:Trak",
        "Inner products, and beside them the residual of each train row",
    )
    registry.part(
        "fold",
        "trak",
        "dattri_trak.fold:TrakFold",
        "The mean of the residuals times the mean of the inner products",
    )
    registry.method(
        "trak",
        {
            "source": "margin",
            "projector": "rademacher",
            "inverse_hessian": {
                "curvature": "gauss-newton",
                "solver": {"name": "cholesky", "damping": {"relative": 1e-3}},
            },
            "scorer": "trak",
            "fold": "trak",
        },
        summary="TRAK: sketched gradients of the margin through their Gauss-Newton matrix, and the "
        "residuals, each averaged over checkpoints",
        formula="S_ij = [mean_c Q_i] [mean_c <P g_i, (E[P g (P g)^T] + damping I)^-1 P h_j>], "
        "g = -d f / d theta of the margin f = log(p / (1 - p)), Q = 1 - p, P another sketch for "
        "each checkpoint c; n times the number of the paper",
        citation="Park et al. 2023, TRAK: Attributing Model Behavior at Scale, section 3 (arXiv "
        "2303.14186)",
    )
