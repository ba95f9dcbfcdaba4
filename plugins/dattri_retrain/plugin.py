"""Retraining: the counterfactual store, and the attributions that come from it."""

from __future__ import annotations

import dattri_core as dattri

NEEDS = "; needs ground_truth=, a counterfactual store"


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    registry.part(
        "ground_truth",
        "retraining",
        "dattri_retrain.store:CounterfactualStore",
        "Trains what is missing, from scratch, and keeps what models give in a folder",
    )
    registry.part(
        "command",
        "retrain",
        "dattri_retrain.command:command",
        "Train a setting's model on other train sets and keep what it gives",
    )
    registry.part(
        "attributor",
        "leave-one-out",
        "dattri_retrain.leave_one_out:LeaveOneOut",
        "The model trained again without each example",
    )
    registry.part(
        "attributor",
        "datamodels",
        "dattri_retrain.datamodels:Datamodels",
        "Linear regression of what models of random subsets give on their train sets",
    )
    registry.part(
        "attributor",
        "semivalue",
        "dattri_retrain.values:Semivalue",
        "What an example adds to models of random permutations' first sets",
    )
    registry.part(
        "attributor",
        "banzhaf",
        "dattri_retrain.values:Banzhaf",
        "Models of random subsets with an example against those without it",
    )
    registry.part(
        "attributor",
        "data-oob",
        "dattri_retrain.values:DataOOB",
        "How well models that did not see an example answer it",
    )
    registry.method(
        "leave-one-out",
        {"attributor": "leave-one-out"},
        summary=f"Leave-one-out by training again without each example{NEEDS}",
        formula="S_ij = n (U_j(all) - U_j(all but i)), U_j(S) the target on test example j of a "
        "model trained on S from scratch, turned so that more is better",
        citation="Cook 1977, Detection of Influential Observation in Linear Regression",
    )
    registry.method(
        "datamodels",
        {"attributor": "datamodels"},
        summary=f"Datamodels: a linear model of what models of random subsets give{NEEDS}",
        formula="S_ij = n w_ij, w_j = argmin sum_k (U_j(S_k) - b - sum_(i in S_k) w_i)^2 + "
        "strength |w|^2, or |w|_1, strength by cross-validation for each j",
        citation="Ilyas et al. 2022, Datamodels: Predicting Predictions from Training Data "
        "(arXiv 2202.00622)",
    )
    registry.method(
        "shapley",
        {"attributor": "semivalue"},
        summary=f"Data Shapley by Monte-Carlo permutations, with standard errors{NEEDS}",
        formula="S_ij = E_pi[U_j(before i, and i) - U_j(before i)], pi a random order",
        citation="Ghorbani and Zou 2019, Data Shapley: Equitable Valuation of Data for Machine "
        "Learning (arXiv 1904.02868)",
    )
    registry.method(
        "tmc-shapley",
        {"attributor": {"name": "semivalue", "truncation": 0.05}},
        summary="Truncated Monte-Carlo Shapley: examples after the first sets of a permutation "
        f"that are as good as all add nothing{NEEDS}",
        formula="S_ij = E_pi[U_j(before i, and i) - U_j(before i)], 0 once "
        "max_j |U_j(before i) - U_j(all)| <= truncation",
        citation="Ghorbani and Zou 2019, Data Shapley: Equitable Valuation of Data for Machine "
        "Learning, algorithm 1 (arXiv 1904.02868)",
    )
    registry.method(
        "beta-shapley",
        {"attributor": {"name": "semivalue", "alpha": 16.0}},
        summary=f"Beta-Shapley: small train sets count more than large ones, or less{NEEDS}",
        formula="S_ij = E_pi[w_(place of i) (U_j(before i, and i) - U_j(before i))], "
        "w_k = n C(n - 1, k - 1) B(k + beta - 1, n - k + alpha) / B(alpha, beta)",
        citation="Kwon and Zou 2021, Beta Shapley: a Unified and Noise-reduced Data Valuation "
        "Framework for Machine Learning (arXiv 2110.14049)",
    )
    registry.method(
        "banzhaf",
        {"attributor": "banzhaf"},
        summary=f"Data Banzhaf: every model counts for every example, maximum sample reuse{NEEDS}",
        formula="S_ij = E[U_j(S) | i in S] - E[U_j(S) | i not in S], S by fair coins",
        citation="Wang and Jia 2023, Data Banzhaf: A Robust Data Valuation Framework for Machine "
        "Learning (arXiv 2205.15466)",
    )
    registry.method(
        "data-oob",
        {"attributor": "data-oob"},
        summary="Data-OOB: how well models that did not see an example answer it, the same for "
        f"every test example{NEEDS} of outcomes on the train set",
        formula="S_ij = mean of U_i(S) over the models of random subsets S without i",
        citation="Kwon and Zou 2023, Data-OOB: Out-of-bag Estimate as a Simple and Efficient Data "
        "Value (arXiv 2304.07718)",
    )
