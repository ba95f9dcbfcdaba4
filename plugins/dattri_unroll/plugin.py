"""Data Value Embedding: influence along a recorded training run."""

from __future__ import annotations

import dattri_core as dattri


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "attributor",
        "dvemb",
        "dattri_unroll.data_value_embedding:DataValueEmbedding",
        "The effect of a train example through every later step of a recorded run",
    )
    registry.method(
        "dvemb",
        {"attributor": "dvemb"},
        summary="Data Value Embedding: what each example did at each step of a recorded run of "
        "SGD, carried through all later steps; Task(checkpoints=dattri_unroll.read_run(folder))",
        formula="S_ij = n sum_{s: i in B_s} (eta_s / |B_s|) <g_i(theta_s), psi_sj>, psi_(T-1)j = "
        "h_j(theta_T), psi_(s-1)j = ((1 - eta_s weight_decay) I - eta_s H_s) psi_sj, "
        "H_s = E_{B_s}[g g^T] of the step's own batch",
        citation="Wang et al. 2024, Capturing the Temporal Dependence of Training Data Influence "
        "(arXiv 2412.09538)",
    )
