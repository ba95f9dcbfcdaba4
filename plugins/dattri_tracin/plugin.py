"""First-order methods: inner products of gradients, at one checkpoint or along a run."""

from __future__ import annotations

import dattri_core as dattri


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.method(
        "grad-dot",
        {"source": "per-example", "scorer": "dot", "fold": "mean"},
        summary="Inner product of train and test gradients",
        formula="S_ij = mean_c <g_i, h_j>",
        citation="Charpiat et al. 2019, Input Similarity from the Neural Network Perspective",
    )
    registry.method(
        "grad-cos",
        {"source": "per-example", "scorer": "cosine", "fold": "mean"},
        summary="Cosine of train and test gradients",
        formula="S_ij = mean_c <g_i, h_j> / (|g_i| |h_j|)",
        citation="Charpiat et al. 2019, Input Similarity from the Neural Network Perspective",
    )
    registry.method(
        "tracin",
        {"source": "per-example", "scorer": "dot", "fold": "weighted"},
        summary="TracInCP: gradient products summed over checkpoints, times learning rates",
        formula="S_ij = sum_c eta_c <g_i(theta_c), h_j(theta_c)>",
        citation="Pruthi et al. 2020, Estimating Training Data Influence by Tracing Gradient "
        "Descent, section 3.3 (arXiv 2002.08484)",
    )
