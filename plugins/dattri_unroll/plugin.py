"""Data Value Embedding, In-Run Data Shapley and SOURCE: influence along a training run."""

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
    registry.part(
        "attributor",
        "in-run-shapley",
        "dattri_unroll.in_run_shapley:InRunShapley",
        "The Shapley value of a train example in each step of a recorded run that saw it",
    )
    registry.part(
        "attributor",
        "source",
        "dattri_unroll.approximate_unrolling:ApproximateUnrolling",
        "Influence along a run, cut into segments of constant curvature",
    )
    registry.method(
        "source",
        {"attributor": "source"},
        summary="SOURCE: unrolled differentiation of a run of SGD whose curvature and gradients "
        "are constant in each of a few segments, from some of its checkpoints",
        formula="S_ij = sum_l <mean_c g_i, (I - exp(-t_l A_l)) A_l^-1 psi_lj>, psi_(l-1)j = "
        "exp(-t_l A_l) psi_lj, psi_Lj = h_j at the last checkpoint, A_l = H_l + weight_decay I, "
        "means over the checkpoints c of segment l, t_l the sum of its learning rates",
        citation="Bae et al. 2024, Training Data Attribution via Approximate Unrolled "
        "Differentiation (arXiv 2405.12186)",
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
    registry.method(
        "magic",
        {"attributor": {"name": "dvemb", "curvature": "hessian"}},
        summary="MAGIC: the exact derivative of a test loss in the weight of each train example "
        "through a whole recorded run, of SGD or Adam; "
        "Task(checkpoints=dattri_unroll.read_run(folder))",
        formula="S_ij = -n d loss_j(theta_T(w)) / d w_i at w = 1, where step s goes along "
        "(1 / |B_s|) sum_{i in B_s} w_i g_i(theta_s)",
        citation="Ilyas and Engstrom 2025, MAGIC: Near-Optimal Data Attribution for Deep Learning "
        "(arXiv 2504.16430); Engstrom et al. 2025, Optimizing ML Training with Metagradient "
        "Descent (arXiv 2503.13751)",
    )
    registry.method(
        "in-run-shapley",
        {"attributor": "in-run-shapley"},
        summary="In-Run Data Shapley: what each example did to the test loss in the steps of a "
        "recorded run of SGD that saw it; Task(checkpoints=dattri_unroll.read_run(folder))",
        formula="S_ij = sum_{s: i in B_s} (eta_s / |B_s|) <g_i(theta_s), h_sj>, or with a "
        "curvature H_sj of test example j, h_sj - H_sj (theta_s - theta_(s+1)) / 2 for h_sj",
        citation="Wang et al. 2024, Data Shapley in One Training Run (arXiv 2406.11011)",
    )
