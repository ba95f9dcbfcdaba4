"""Influence functions: test gradients through the inverse Hessian of the train loss."""

from __future__ import annotations

import dattri_core as dattri


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.method(
        "if-explicit",
        {
            "source": "per-example",
            "inverse_hessian": {
                "curvature": "hessian",
                "solver": {"name": "cholesky", "damping": 1e-3},
            },
            "scorer": "dot",
            "fold": "mean",
        },
        summary="Influence function with the Hessian written down and factorised",
        formula="S_ij = <g_i, (H + damping I)^-1 h_j>, H the Hessian of the mean train loss",
        citation="Koh and Liang 2017, Understanding Black-box Predictions via Influence "
        "Functions, equation 2 (arXiv 1703.04730)",
    )
    registry.method(
        "if-cg",
        {
            "source": "per-example",
            "inverse_hessian": {
                "curvature": "hessian",
                "solver": {"name": "cg", "damping": 1e-3},
            },
            "scorer": "dot",
            "fold": "mean",
        },
        summary="Influence function by conjugate gradients on Hessian-vector products",
        formula="S_ij = <g_i, (H + damping I)^-1 h_j>, H the Hessian of the mean train loss",
        citation="Koh and Liang 2017, Understanding Black-box Predictions via Influence "
        "Functions, section 3 (arXiv 1703.04730); Martens 2010, Deep learning via Hessian-free "
        "optimization",
    )
    registry.method(
        "if-woodbury",
        {
            "source": "per-example",
            "inverse_hessian": {
                "curvature": "ggn",
                "solver": {"name": "woodbury", "damping": 1e-3},
            },
            "scorer": "dot",
            "fold": "mean",
        },
        summary="Influence function with the exact inverse of the Gauss-Newton matrix, from inner "
        "products of rows",
        formula="S_ij = <g_i, (G + damping I)^-1 h_j>, G = 1/n sum_i J_i^T C_i J_i, by the matrix "
        "of inner products of its rows",
        citation="Koh and Liang 2017, Understanding Black-box Predictions via Influence "
        "Functions, equation 2 (arXiv 1703.04730), with the matrix of Schraudolph 2002 and the "
        "identity of Woodbury 1950",
    )
