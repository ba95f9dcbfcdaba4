"""Representer point selection: a last layer as a sum over the train set."""

from __future__ import annotations

import dattri_core as dattri


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "source",
        "last-layer",
        "dattri_rps.source:LastLayer",
        "Gradients of the last layer after it is fitted again with an L2 penalty",
    )
    registry.part(
        "scorer",
        "representer",
        "dattri_rps.scorer:Representer",
        "Inner products of last-layer gradients in the unit of the model's outputs",
    )
    registry.method(
        "rps-l2",
        {"source": "last-layer", "scorer": "representer", "fold": "mean"},
        summary="Representer points: what each train example adds to a logit, once the last layer "
        "is fitted again, to the labels and with an L2 penalty",
        formula="S_ij = alpha_ic f_i^T f_j, alpha_i = -1/(2 l2 n) dL_i/doutputs, f the features "
        "of the last layer and 1, c the output asked for; sum_i S_ij is that output",
        citation="Yeh et al. 2018, Representer Point Selection for Explaining Deep Neural "
        "Networks, theorem 3.1 and section 3.2 (arXiv 1811.09720)",
    )
