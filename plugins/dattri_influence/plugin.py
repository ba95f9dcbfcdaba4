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
        "if-lissa",
        {
            "source": "per-example",
            "inverse_hessian": {
                "curvature": "ggn",
                "solver": {"name": "lissa", "damping": 1e-3},
            },
            "scorer": "dot",
            "fold": "mean",
        },
        summary="Influence function by the series LiSSA on samples of the train set",
        formula="S_ij = <g_i, (G + damping I)^-1 h_j>, G the GGN of the mean train loss",
        citation="Agarwal et al. 2017, Second-Order Stochastic Optimization for Machine Learning "
        "in Linear Time (arXiv 1602.03943); Koh and Liang 2017, section 3 (arXiv 1703.04730)",
    )
    registry.method(
        "if-arnoldi",
        {
            "source": "per-example",
            "inverse_hessian": {
                "curvature": "hessian",
                "solver": {"name": "arnoldi", "damping": 1e-3, "reduced": True},
            },
            "scorer": "dot",
            "fold": "mean",
        },
        summary="Influence function in the eigenvectors of largest eigenvalue, found by Arnoldi",
        formula="S_ij = <V^T g_i, (L + damping I)^-1 V^T h_j>, V and L the 100 eigenpairs of "
        "largest magnitude of the Hessian of the mean train loss",
        citation="Schioppa et al. 2022, Scaling Up Influence Functions (arXiv 2112.03052)",
    )
