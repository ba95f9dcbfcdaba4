"""Metrics: how good scores are."""

from __future__ import annotations

import dattri_core as dattri

METRICS = {
    "loo-pearson": (
        "leave_one_out:LeaveOneOutPearson",
        "Pearson correlation with retraining without each example",
    ),
    "loo-spearman": (
        "leave_one_out:LeaveOneOutSpearman",
        "Spearman correlation with retraining without each example",
    ),
    "lds": (
        "datamodels:LinearDatamodelingScore",
        "Linear datamodeling score: rank correlation with retraining on random subsets",
    ),
    "top-k-overlap": (
        "overlap:TopKOverlap",
        "Share of the k most helpful examples that retraining without each example confirms",
    ),
    "brittleness": (
        "flips:Brittleness",
        "Median number of removed examples that flips a prediction, by retraining",
    ),
    "brittleness-share": (
        "flips:BrittlenessShare",
        "Share of predictions that removing a share of the train set flips, by retraining",
    ),
    "removal-curve": (
        "curves:RemovalCurve",
        "How well models do without the most helpful examples",
    ),
    "insertion-curve": (
        "curves:InsertionCurve",
        "How well models do with the most helpful examples only",
    ),
    "mislabel-auroc": (
        "mislabel:MislabelAuroc",
        "Chance that a wrongly labelled train example is more suspicious than a correct one",
    ),
    "mislabel-average-precision": (
        "mislabel:MislabelAveragePrecision",
        "Average precision of ranking wrongly labelled train examples first",
    ),
    "mislabel-inspection-area": (
        "mislabel:MislabelInspectionArea",
        "Area under the share of wrong labels found by the share of examples looked at",
    ),
    "class-detection": (
        "classes:ClassDetection",
        "Share of the most helpful examples that are of the test's class",
    ),
    "subclass-detection": (
        "classes:SubclassDetection",
        "Share of the most helpful examples that are of the test's subclass",
    ),
    "shortcut-detection": (
        "origins:ShortcutDetection",
        "Average precision of ranking the examples that a shortcut was learned from first",
    ),
    "mixed-source-detection": (
        "origins:MixedSourceDetection",
        "Average precision of ranking train examples of the test's source first",
    ),
    "model-randomisation": (
        "stability:ModelRandomisation",
        "Rank correlation with scores for random weights; near 0 is good",
    ),
    "rank-stability": (
        "stability:RankStability",
        "Rank correlation of scores for models trained with different seeds",
    ),
}


@dattri.hookimpl
def register(registry: dattri.Registry) -> None:
    """Name them; nothing is imported until it is used."""
    for name, (target, summary) in METRICS.items():
        registry.part("metric", name, f"dattri_metrics.{target}", summary)
