"""Influence functions: test gradients through the inverse Hessian of the train loss."""

from __future__ import annotations

import dattri_core as dattri

GROSSE = (
    "Grosse et al. 2023, Studying Large Language Model Generalization with Influence Functions "
    "(arXiv 2308.03296)"
)
BARSHAN = (
    "Barshan, Brunet and Dziugaite 2020, RelatIF: Identifying Explanatory Training Examples via "
    "Relative Influence (arXiv 2003.11630)"
)


def spectral(curvature: str) -> dict[str, object]:
    """Return a method with a curvature whose eigenvectors are known.

    The damping is a tenth of the mean eigenvalue of each layer; another one costs no new fit.
    """
    return {
        "source": "per-example",
        "inverse_hessian": {
            "curvature": {"name": curvature, "fisher": "sampled"},
            "solver": {"name": "spectral", "damping": {"relative": 0.1}},
        },
        "scorer": "dot",
        "fold": "mean",
    }


def relative(inverse: object) -> dict[str, object]:
    """Return a method whose influences are relative to that of a train example on itself."""
    return {
        "source": "per-example",
        "inverse_hessian": inverse,
        "scorer": "relatif",
        "fold": "mean",
    }


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.method(
        "if-explicit",
        {
            "source": "per-example",
            "inverse_hessian": {"name": "exact", "curvature": "hessian", "damping": 1e-3},
            "scorer": "dot",
            "fold": "mean",
        },
        summary="Influence function with the exact inverse of the Hessian, or, above 16384 "
        "parameters, of the Gauss-Newton matrix, or of the empirical Fisher where that has too "
        "many rows",
        formula="S_ij = <g_i, (H + damping I)^-1 h_j>, H the Hessian of the mean train loss, "
        "written down and factorised, or the Gauss-Newton or the empirical Fisher matrix from "
        "inner products of its rows",
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
        "astra",
        {
            "source": "per-example",
            "inverse_hessian": {
                "curvature": "ggn",
                "solver": {"name": "lissa", "damping": 1e-2, "batch": 256, "depth": 100},
                "preconditioner": {
                    "curvature": {"name": "ekfac", "fisher": "ggn"},
                    "solver": {"name": "spectral", "damping": {"relative": 0.1}},
                },
            },
            "scorer": "dot",
            "fold": "mean",
        },
        summary="Influence function by a series on samples of the train set that EK-FAC "
        "preconditions, from EK-FAC's answer to that of the Gauss-Newton matrix",
        formula="S_ij = <g_i, v_j>, v <- v - M ((G_S + damping I) v - h_j) / s for 100 samples S, "
        "M the inverse of EK-FAC at its own damping, G_S the GGN of the mean loss over S; the "
        "limit is (G + damping I)^-1 h_j whatever M is",
        citation="Wang et al. 2025, Better Training Data Attribution via Better Inverse "
        "Hessian-Vector Products (arXiv 2507.14740)",
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
    registry.method(
        "if-diagonal",
        spectral("diagonal"),
        summary="Influence function with the diagonal of the Fisher matrix",
        formula="S_ij = <g_i, (diag(F) + damping I)^-1 h_j>, F = E[g g^T] at labels drawn from "
        "the model",
        citation="Koh and Liang 2017 (arXiv 1703.04730, equation 2), with the diagonal of the "
        "Fisher matrix",
    )
    registry.method(
        "if-kfac",
        spectral("kfac"),
        summary="Influence function with the Kronecker-factored Fisher matrix of each layer",
        formula="S_ij = sum over layers of <g_i, (S (x) A + damping I)^-1 h_j>, S = E[e e^T] at "
        "labels drawn from the model, A = E[x x^T]",
        citation="Martens and Grosse 2015, Optimizing Neural Networks with Kronecker-factored "
        f"Approximate Curvature (arXiv 1503.05671); {GROSSE}",
    )
    registry.method(
        "if-ekfac",
        spectral("ekfac"),
        summary="Influence function with the eigenvalue-corrected Kronecker-factored Fisher matrix",
        formula="S_ij = sum over layers of <g_i, Q (L + damping I)^-1 Q^T h_j>, Q = Q_S (x) Q_A, "
        "L = E[(Q^T g)^2] at labels drawn from the model",
        citation="George et al. 2018, Fast Approximate Natural Gradient Descent in a "
        f"Kronecker-factored Eigenbasis (arXiv 1806.03884); {GROSSE}",
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
    registry.method(
        "if-datainf",
        {
            "source": "per-example",
            "inverse_hessian": {
                "curvature": {"name": "gauss-newton", "block": True},
                "solver": {"name": "datainf", "damping": {"relative": 0.1}},
            },
            "scorer": "dot",
            "fold": "mean",
        },
        summary="Influence function with the mean of the inverses of single gradients, by layer",
        formula="S_ij = sum over layers of <g_i, 1/n sum_k (g_k g_k^T + damping I)^-1 h_j>",
        citation="Kwon et al. 2024, DataInf: Efficiently Estimating Data Influence in LoRA-tuned "
        "LLMs and Diffusion Models, equation 5 (arXiv 2310.00902)",
    )
    registry.method(
        "relatif-explicit",
        relative({"name": "exact", "curvature": "ggn", "damping": 1e-3}),
        summary="Relative influence with the exact inverse of the Gauss-Newton matrix, or, where "
        "its rows are too many, of the empirical Fisher matrix",
        formula="S_ij = <g_i, (G + damping I)^-1 h_j> / sqrt(g_i^T (G + damping I)^-1 g_i)",
        citation=BARSHAN,
    )
    registry.method(
        "relatif-ekfac",
        relative(spectral("ekfac")["inverse_hessian"]),
        summary="Relative influence with the eigenvalue-corrected Kronecker-factored Fisher matrix",
        formula="S_ij = <g_i, H^-1 h_j> / sqrt(g_i^T H^-1 g_i), both summed over layers, "
        "H = Q (L + damping I) Q^T of each layer as in if-ekfac",
        citation=f"{BARSHAN}; {GROSSE}",
    )
    registry.method(
        "logra",
        {
            "source": "per-example",
            "projector": {"name": "kronecker", "rank": 64, "uncovered": "sketch"},
            "inverse_hessian": {
                "curvature": {"name": "gauss-newton", "block": True},
                "solver": {"name": "woodbury", "damping": {"relative": 0.1}},
            },
            "scorer": "dot",
            "fold": "mean",
        },
        summary="Influence function in a Kronecker sketch of each layer, with its Gauss-Newton "
        "matrix there; initialisation='pca' for principal directions",
        formula="S_ij = sum over layers of <k_i, (E[k k^T] + damping I)^-1 k_j>, "
        "k = P_out G P_in^T of the gradient G",
        citation="Choe et al. 2024, What is Your Data Worth to GPT? LLM-Scale Data Valuation with "
        "Influence Functions, section 3 (arXiv 2405.13954)",
    )
