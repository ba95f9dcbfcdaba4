"""KNN-Shapley: exact values of train examples for nearest-neighbour predictors."""

from __future__ import annotations

import dattri_core as dattri

JIA = "Jia et al. 2019, Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms, "
MEAN = "; the data value of train example i is the mean of S_ij over test examples j"


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "scorer",
        "knn-shapley",
        "dattri_knn.classification:KNNShapley",
        "Shapley values of train rows for the vote of the K nearest, exact",
    )
    registry.part(
        "scorer",
        "knn-shapley-regression",
        "dattri_knn.regression:KNNShapleyRegression",
        "Shapley values of train rows for the squared error of the mean of the K nearest, exact",
    )
    registry.part(
        "scorer",
        "knn-shapley-soft-label",
        "dattri_knn.soft_label:SoftLabelKNNShapley",
        "Shapley values of train rows for the probability that the K nearest give the label, exact",
    )
    registry.part(
        "scorer",
        "knn-shapley-threshold",
        "dattri_knn.threshold:ThresholdKNNShapley",
        "Shapley values of train rows for the share of the label within a radius, exact",
    )
    registry.method(
        "knn-shapley",
        {"source": "representation", "scorer": "knn-shapley", "fold": "mean"},
        summary="KNN-Shapley: exact Shapley values for a K-nearest-neighbour classifier on the "
        "features before the last linear layer, or of any module",
        formula="S_ij = Shapley value of i for v(S) = 1/K sum_(k in K nearest of S) 1[y_k = y_j]: "
        "s_n = 1[y_n = y] min(K, n) / (K n), "
        "s_i = s_(i+1) + (1[y_i = y] - 1[y_(i+1) = y]) min(K, i) / (K i), nearest first" + MEAN,
        citation=f"{JIA}, theorem 1 (arXiv 1908.08619)",
    )
    registry.method(
        "knn-shapley-weighted",
        {
            "source": "representation",
            "scorer": {"name": "knn-shapley", "weights": "gaussian"},
            "fold": "mean",
        },
        summary="KNN-Shapley of a weighted vote: weights fall with the distance, in the unit of "
        "that of the K-th nearest, and are not divided by their sum",
        formula="S_ij = Shapley value of i for v(S) = 1/K sum_(k in K nearest of S) w_k "
        "1[y_k = y_j], w = exp(-(d / d_K)^2 / 2)" + MEAN,
        citation=f"{JIA} (arXiv 1908.08619)",
    )
    registry.method(
        "knn-shapley-regression",
        {"source": "representation", "scorer": "knn-shapley-regression", "fold": "mean"},
        summary="KNN-Shapley for numbers as labels: the squared error of the mean of the K nearest",
        formula="S_ij = Shapley value of i for "
        "v(S) = -(1/K sum_(k in K nearest of S) y_k - y_j)^2" + MEAN,
        citation=f"{JIA} (arXiv 1908.08619), regression",
    )
    registry.method(
        "knn-shapley-soft-label",
        {"source": "representation", "scorer": "knn-shapley-soft-label", "fold": "mean"},
        summary="KNN-Shapley of the soft label: the share of the right label among the K nearest",
        formula="S_ij = Shapley value of i for v(S) = mean of 1[y_k = y_j] over the K nearest "
        "of S, v of none = 1 / number of labels" + MEAN,
        citation='Wang and Jia 2023, A Note on "Efficient Task-Specific Data Valuation for Nearest '
        'Neighbor Algorithms" (arXiv 2304.04258)',
    )
    registry.method(
        "knn-shapley-threshold",
        {"source": "representation", "scorer": "knn-shapley-threshold", "fold": "mean"},
        summary="Threshold KNN-Shapley: all rows within a distance vote, in time linear in the "
        "train set",
        formula="S_ij = Shapley value of i for v(S) = mean of 1[y_k = y_j] over k in S with "
        "d_kj <= threshold, v of none = 1 / number of labels" + MEAN,
        citation="Wang et al. 2023, Threshold KNN-Shapley: A Linear-Time and Privacy-Friendly "
        "Approach to Data Valuation (arXiv 2308.15709)",
    )
