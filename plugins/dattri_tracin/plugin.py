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
    registry.method(
        "less",
        {
            "source": "adam-update",
            "projector": {"name": "rademacher", "dim": 8192},
            "scorer": "cosine",
            "fold": "weighted",
        },
        summary="LESS: cosine of the step of Adam that a train example causes and a test "
        "gradient, both sketched, summed over checkpoints, times learning rates; needs the state "
        "of the optimiser, Task(optimisers=...)",
        formula="S_ij = sum_c eta_c <P Gamma_i, P h_j> / (|P Gamma_i| |P h_j|), "
        "Gamma = m' / (root(v') + epsilon), m' = (b1 m + (1 - b1) g) / (1 - b1^T), "
        "v' = (b2 v + (1 - b2) g^2) / (1 - b2^T), T = t + 1, "
        "P another sketch for each checkpoint c",
        citation="Xia et al. 2024, LESS: Selecting Influential Data for Targeted Instruction "
        "Tuning, section 3 (arXiv 2402.04333)",
    )
