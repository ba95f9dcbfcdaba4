"""Mislabel detection: how well a suspicion ranks wrongly labelled train examples first."""

from __future__ import annotations

from typing import Any

import numpy as np

from dattri_core import InputError
from dattri_metrics.result import MetricResult

Array = np.ndarray[Any, Any]
CHANCE = 0.5
WORK = 4_000_000  # counts held at once while resampling


def auroc(
    suspicion: Any,
    is_mislabelled: Any,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> MetricResult:
    """Return the area under the ROC curve of finding mislabelled train examples.

    The chance that a mislabelled example is more suspicious than a correctly labelled one, ties
    counted half:

        AUROC = (sum of the ranks of the mislabelled - p (p + 1) / 2) / (p q)

    with p mislabelled and q correct examples and mid-ranks for ties (Mann and Whitney 1947), in
    O(n log n). The interval is a percentile bootstrap that draws mislabelled and correct examples
    separately, with replacement.

    **Direction.** High suspicion means "look here first". The field's suspicion is self-influence
    as it is (high: the example is explained by itself only; Koh and Liang 2017, section 5.4, and
    Pruthi et al. 2020, arXiv 2002.08484, section 4.1). Of scores for a clean test set it is *minus*
    their mean (low: the example harms).

    Args:
        suspicion: ``[n]`` finite numbers.
        is_mislabelled: ``[n]`` true where the label is wrong.
        resamples: Bootstrap draws.
        confidence: Share of the draws inside the interval.
        seed: Of the draws.

    Returns:
        Value and interval in [0, 1]; chance level 0.5.

    Raises:
        InputError: Lengths differ, a number is not finite, or one of the two groups is empty.
    """
    scores = np.asarray(suspicion, dtype=np.float64)
    wrong = np.asarray(is_mislabelled)
    _check(scores, wrong)
    wrong = wrong.astype(bool)
    correct = np.sort(scores[~wrong])
    mislabelled = np.sort(scores[wrong])  # sorted, so that the order of examples cannot matter
    below = np.searchsorted(correct, mislabelled, side="left")
    upto = np.searchsorted(correct, mislabelled, side="right")
    pairs = len(correct) * len(mislabelled)
    value = float((below + upto).sum() / (2 * pairs))
    draws = _resampled(below, upto, len(correct), resamples, np.random.default_rng(seed)) / pairs
    tail = 50 * (1 - confidence)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return MetricResult(value, float(low), float(high), CHANCE, confidence)


def _resampled(
    below: Array, upto: Array, count: int, resamples: int, random: np.random.Generator
) -> Array:
    """Return the number of pairs won in each resample, ``[resamples]``."""
    won = np.empty(resamples)
    step = max(1, WORK // (count + len(below)))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        # how many drawn correct examples lie before each place of their sorted order
        before = np.zeros((rows, count + 1))
        np.cumsum(_draw(random, rows, count), axis=1, out=before[:, 1:])
        times = _draw(random, rows, len(below))
        won[start : start + rows] = (times * (before[:, below] + before[:, upto])).sum(1) / 2
    return won


def _draw(random: np.random.Generator, rows: int, count: int) -> Array:
    """Return how often each of ``count`` items is drawn in ``count`` draws, ``[rows, count]``."""
    drawn = random.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)


def _check(scores: Array, wrong: Array) -> None:
    if scores.ndim != 1 or scores.shape != wrong.shape:
        raise InputError(
            f"mislabel AUROC: suspicion has shape {scores.shape} and is_mislabelled {wrong.shape}; "
            "expected one number and one truth value for each train example, [n] and [n]"
        )
    if not np.isfinite(scores).all():
        first = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise InputError(
            f"mislabel AUROC: the suspicion of example {first} is {scores[first]}; "
            "expected finite numbers"
        )
    if not np.isin(wrong, (0, 1)).all():
        raise InputError("mislabel AUROC: is_mislabelled holds other values than true and false")
    if wrong.all() or not wrong.any():
        raise InputError(
            f"mislabel AUROC: {int(wrong.sum())} of {len(wrong)} examples are mislabelled; at "
            "least one mislabelled and one correct example are needed"
        )
