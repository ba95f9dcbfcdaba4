"""GraSS: influence functions in sparse sketches of the gradients, flat or factored."""

from __future__ import annotations

import dattri_core as dattri

HU = (
    "Hu et al. 2025, GraSS: Scalable Data Attribution with Gradient Sparsification and Sparse "
    "Projection, section 3 (arXiv 2505.18976)"
)


def sketched(projector: dict[str, object]) -> dict[str, object]:
    """Return a method with the Gauss-Newton matrix of each block of sketched rows."""
    return {
        "source": "per-example",
        "projector": projector,
        "inverse_hessian": {
            "curvature": {"name": "gauss-newton", "block": True},
            "solver": {"name": "woodbury", "damping": {"relative": 0.1}},
        },
        "scorer": "dot",
        "fold": "mean",
    }


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.method(
        "grass",
        sketched({"name": "grass", "scope": "block"}),
        summary="Influence function in a mask and a sparse sketch of each layer's gradient, with "
        "its Gauss-Newton matrix there; scope='row' for the whole gradient",
        formula="S_ij = sum over layers of <k_i, (E[k k^T] + damping I)^-1 k_j>, "
        "k = S M g of the layer's gradient g, M a random mask, S a sparse sketch",
        citation=HU,
    )
    registry.method(
        "factgrass",
        sketched({"name": "factgrass", "uncovered": "sketch"}),
        summary="Influence function in a mask of each layer's inputs and outputs and a sparse "
        "sketch of their product, with its Gauss-Newton matrix there",
        formula="S_ij = sum over layers of <k_i, (E[k k^T] + damping I)^-1 k_j>, "
        "k = S vec(M_out G M_in^T) of the layer's gradient G, M_out and M_in random masks, S a "
        "sparse sketch",
        citation=HU,
    )
