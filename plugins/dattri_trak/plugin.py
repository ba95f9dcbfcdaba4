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
    registry.part(
        "curvature",
        "mixed",
        "dattri_trak.mixed:Mixed",
        "The second moment of the rows of the train set and of examples like those asked",
    )
    registry.method(
        "trak",
        {
            "source": "margin",
            "projector": "block-count-sketch",
            "inverse_hessian": {
                "curvature": "gauss-newton",
                "solver": {"name": "cholesky", "damping": {"relative": 0.1}},
            },
            "scorer": "trak",
            "fold": "trak",
        },
        summary="TRAK: sketched gradients of the margin through their Gauss-Newton matrix, and the "
        "residuals, each averaged over checkpoints",
        formula="S_ij = [mean_c Q_i] [mean_c <P g_i, (E[P g (P g)^T] + damping I)^-1 P h_j>], "
        "g = -d f / d theta of the margin f = log(p / (1 - p)), Q = 1 - p, P another sketch for "
        "each checkpoint c, sparse where the paper's is dense "
        "(projector='gaussian' or 'rademacher'); n times the number of the paper",
        citation="Park et al. 2023, TRAK: Attributing Model Behavior at Scale, section 3 (arXiv "
        "2303.14186)",
    )
    registry.method(
        "trackstar",
        {
            "source": "per-example",
            "projector": {"name": "kronecker", "rank": 64, "uncovered": "sketch"},
            "inverse_hessian": {
                "curvature": {"name": "mixed", "block": True},
                "solver": {"name": "spectral", "damping": {"relative": 0.1}},
                "form": "two-sided",
            },
            "scorer": "cosine",
            "fold": "mean",
        },
        summary="TrackStar: cosine of sketched gradients after the root of the inverse of a second "
        "moment that mixes the train set with reference examples, Task(reference=...); without "
        "the optimiser's second moments, which source='second-moment-normalised' adds",
        formula="S_ij = <k_i, k_j> / (|k_i| |k_j|), k = (R + damping I)^-1/2 P g, "
        "R = w E_reference[P h (P h)^T] + (1 - w) E_train[P g (P g)^T], each layer apart",
        citation="Chang et al. 2024, Scalable Influence and Fact Tracing for Large Language Model "
        "Pretraining, section 3 (arXiv 2410.17413)",
    )
