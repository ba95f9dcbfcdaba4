"""Correlations of columns, averaged over tests: what LDS and leave-one-out correlation share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from dattri_core import InputError
from dattri_metrics.ranks import Ranks
from dattri_metrics.spread import Estimate

Array = np.ndarray[Any, Any]
Kind = Literal["pearson", "spearman"]
WORK = 4_000_000  # entries of the blocks of columns that are sorted together
ROUNDING = 1e-12


def correlate(metric: str, correlation: Kind, predicted: Array, truth: Array) -> Estimate:
    """Return the correlation of each column over rows, and its influence function.

    Columns without variation, up to rounding (a range of at most 1e-12 of the largest value):

    - of ``truth``: the column is left out, since there is nothing to predict;
    - of ``predicted``, where the truth varies: 0, what a guess would give. It is not left out,
      which would reward scores for being silent.

    Args:
        metric: Who asks, for the message.
        correlation: ``"pearson"``, or ``"spearman"``: that of ranks, ties sharing their mean rank.
        predicted: ``[n, m]``.
        truth: ``[n, m]``.

    Raises:
        InputError: There are fewer than 3 rows, or no column of the truth varies.
    """
    if len(truth) < 3:
        raise InputError(f"{metric}: a correlation over {len(truth)} rows; give at least 3")
    kept = varies(truth)
    if not kept.any():
        raise InputError(
            f"{metric}: no outcome varies over the {len(truth)} rows of any of {truth.shape[1]} "
            "tests; nothing can be predicted"
        )
    predicted, truth = predicted[:, kept], truth[:, kept]
    said = varies(predicted)
    values, influence = np.zeros(truth.shape[1]), np.zeros(truth.shape)
    found = KINDS[correlation]
    for block in _blocks(np.flatnonzero(said), len(truth)):
        values[block], influence[:, block] = found(predicted[:, block], truth[:, block])
    # Pearson's is scaled by two variances that the rows gave; ranks have theirs whatever the rows
    return Estimate(values, influence, fitted=2 if correlation == "pearson" else 0)


def ceiling(metric: str, correlation: Kind, truth: Array, again: Array) -> float:
    """Return the correlation that the noise of training leaves to the best scores.

    Outcomes are a mean for each train set plus the noise of one training. Let rho be the mean
    correlation of the outcomes of two independent trainings on the same sets: retrain against
    retrain. Scores that predict the means exactly then correlate with one training by sqrt(rho)
    (attenuation; Spearman 1904). That is exact for Pearson correlations and close for ranks.

    Args:
        metric: Who asks, for the message.
        correlation: Which.
        truth: ``[n, m]``.
        again: ``[n, m]``, of models trained with other seeds on the same sets.

    Returns:
        sqrt(rho), 0 when rho is negative.
    """
    return math.sqrt(max(0.0, float(correlate(metric, correlation, again, truth).values.mean())))


def varies(columns: Array) -> Array:
    """Return which columns hold different numbers, ``[m]``."""
    spread: Array = np.ptp(columns, axis=0) > ROUNDING * np.abs(columns).max(axis=0)
    return spread


def _blocks(columns: Array, rows: int) -> Iterator[Array]:
    step = max(1, WORK // rows)
    for start in range(0, len(columns), step):
        yield columns[start : start + step]


def _pearson(x: Array, y: Array) -> tuple[Array, Array]:
    u, v = x - x.mean(axis=0), y - y.mean(axis=0)
    u, v = u / np.abs(u).max(axis=0), v / np.abs(v).max(axis=0)  # squares of 1e-200 vanish
    a, b = (u * u).mean(axis=0), (v * v).mean(axis=0)
    scale = np.sqrt(a * b)
    value = (u * v).mean(axis=0) / scale
    return value, u * v / scale - value / 2 * (u * u / a + v * v / b)


def _spearman(x: Array, y: Array) -> tuple[Array, Array]:
    """Return c / sqrt(a b) of ranks; a row moves c itself and through the ranks of the others."""
    of_x, of_y = Ranks.of(x), Ranks.of(y)
    u, v = of_x.centred, of_y.centred
    a, b, c = (u * u).mean(axis=0), (v * v).mean(axis=0), (u * v).mean(axis=0)
    scale = np.sqrt(a * b)
    value = c / scale
    moved_c = u * v + of_x.above(v) + of_y.above(u) - 3 * c
    moved_a = u * u + 2 * of_x.above(u) - 3 * a
    moved_b = v * v + 2 * of_y.above(v) - 3 * b
    return value, moved_c / scale - value / 2 * (moved_a / a + moved_b / b)


KINDS: dict[Kind, Callable[[Array, Array], tuple[Array, Array]]] = {
    "pearson": _pearson,
    "spearman": _spearman,
}
