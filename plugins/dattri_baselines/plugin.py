"""Baselines that every table needs."""

from __future__ import annotations

import dattri_core as dattri

FEATURES = {"name": "representation", "label": "none"}
"""Their similarity reads no label, so that examples need not have one, such as sequences."""


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "attributor",
        "random",
        "dattri_baselines.random:Random",
        "Independent standard normal scores",
    )
    registry.method(
        "random",
        {"attributor": "random"},
        summary="Independent standard normal scores: what chance gives",
        formula="S_ij ~ N(0, 1), independent, a function of the seed and of (i, j)",
        citation="None: the chance level of every table",
    )
    registry.part(
        "source",
        "loss",
        "dattri_baselines.loss:LossValue",
        "The train loss of each example; no gradient",
    )
    registry.part(
        "scorer",
        "loss",
        "dattri_baselines.train_only:TrainLoss",
        "The loss of the train example, whatever the test example",
    )
    registry.part(
        "scorer",
        "train-norm",
        "dattri_baselines.train_only:TrainNorm",
        "The norm of the train row, whatever the test example",
    )
    registry.part(
        "attributor",
        "self-influence",
        "dattri_baselines.self_influence:SelfInfluence",
        "What a method says of each train example for itself",
    )
    registry.part("attributor", "bm25", "dattri_baselines.bm25:BM25", "BM25 of texts or token ids")
    registry.part(
        "attributor", "tf-idf", "dattri_baselines.tf_idf:TfIdf", "TF-IDF of texts or token ids"
    )
    registry.method(
        "loss",
        {"source": "loss", "scorer": "loss", "fold": "mean"},
        summary="The loss of the train example, the same for every test example",
        formula="S_ij = mean_c loss_i(theta_c); large where the loss is, like self-influence",
        citation="None: a baseline of data selection and of finding wrong labels",
    )
    registry.method(
        "grad-norm",
        {"source": "per-example", "scorer": "train-norm", "fold": "mean"},
        summary="GraNd: the gradient norm of the train example, the same for every test example",
        formula="S_ij = mean_c |g_i(theta_c)|",
        citation="Paul et al. 2021, Deep Learning on a Data Diet: Finding Important Examples Early "
        "in Training, definition 2.1 (arXiv 2107.07075)",
    )
    registry.method(
        "self-influence",
        {"attributor": "self-influence"},
        summary="Self-influence of the train example, by any method, the same for every test "
        "example",
        formula="S_ij = S'_ii of another method; of grad-dot mean_c |g_i(theta_c)|^2",
        citation="Koh and Liang 2017, Understanding Black-box Predictions via Influence Functions, "
        "section 5.4 (arXiv 1703.04730); Pruthi et al. 2020, TracIn (arXiv 2002.08484)",
    )
    registry.method(
        "embedding-similarity",
        {"source": FEATURES, "scorer": "cosine", "fold": "mean"},
        summary="Cosine of features, by default those before the last linear layer",
        formula="S_ij = <f_i, f_j> / (|f_i| |f_j|)",
        citation="Hanawa et al. 2021, Evaluation of Similarity-based Explanations "
        "(arXiv 2006.04528)",
    )
    registry.method(
        "embedding-distance",
        {"source": FEATURES, "scorer": "negative-distance", "fold": "mean"},
        summary="Minus the L2 distance of features, by default those before the last linear layer",
        formula="S_ij = -|f_i - f_j|",
        citation="Hanawa et al. 2021, Evaluation of Similarity-based Explanations "
        "(arXiv 2006.04528)",
    )
    registry.method(
        "bm25",
        {"attributor": "bm25"},
        summary="BM25 of train texts for the words of each test text; needs the extra 'text'",
        formula="S_ij = sum_(t in j) log(1 + (n - n_t + 1/2) / (n_t + 1/2)) "
        "f_ti / (f_ti + k1 (1 - b + b l_i / l))",
        citation="Robertson and Zaragoza 2009, The Probabilistic Relevance Framework: BM25 and "
        "Beyond; Akyürek et al. 2022 (arXiv 2205.11482)",
    )
    registry.method(
        "tf-idf",
        {"attributor": "tf-idf"},
        summary="Cosine of the weighted words of two texts; needs the extra 'text'",
        formula="S_ij = <u_i, u_j> / (|u_i| |u_j|), u_t = f_t (1 + log((1 + n) / (1 + n_t)))",
        citation="Salton and Buckley 1988, Term-weighting approaches in automatic text retrieval",
    )
