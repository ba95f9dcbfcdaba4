"""Intervals: what the mean over test examples would be with other tests and other rows.

A metric here is a mean over tests of a number that is computed from rows: from the subsets that
models were trained on, or from the train examples. Tests and rows are both samples.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from attrs import field, frozen
from scipy import stats

from dattri_core import InputError, MetricResult
from dattri_metrics.intervals import Shape
from dattri_metrics.spread import Estimate, Spread, spread

Array = np.ndarray[Any, Any]
GROUPS = 2000  # more rows than these are put into so many random groups, which are then drawn
FEW = 10  # the mean of fewer than these, drawn again, takes few values: Student's interval instead
UNBOUNDED = (-math.inf, math.inf)


@frozen
class Bootstrap:
    """How an interval is drawn.

    Args:
        resamples: Bootstrap draws, of metrics without bounds; those of the others have a formula.
        confidence: How often intervals are to hold the truth, between 0 and 1.
        seed: Of the draws.
    """

    resamples: int = field(default=1000)
    confidence: float = field(default=0.95)
    seed: int = field(default=0)

    def __attrs_post_init__(self) -> None:
        if self.resamples < 1 or self.seed < 0 or not 0 < self.confidence < 1:
            raise InputError(
                f"bootstrap: got {self}; expected at least one resample, a confidence between 0 "
                "and 1 and a seed of 0 or more"
            )


DEFAULT = Bootstrap()


def summary(
    estimate: Estimate,
    chance: float,
    bootstrap: Bootstrap,
    *,
    shape: Shape | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
    ceiling: float | None = None,
    higher_is_better: bool = True,
    per_test: bool = False,
) -> MetricResult:
    """Return the mean over tests with its interval, from the variance that `spread` gives.

    Bounded metrics have a ``shape``, which makes the interval by a formula. Without one it is a
    bootstrap: tests and rows are drawn with replacement, independently, and the draws of the mean
    are stretched to the variance and by the ratio of Student's to the normal quantile.

    Why not resample and compute again: a drawn subset that comes up twice is a tie, which a rank
    correlation takes for knowledge, and drawing rows and tests together counts what they share
    three times (Owen 2007, arXiv 0708.0432).

    Args:
        estimate: Of the metric.
        chance: What scores without information give.
        bootstrap: The confidence, and how to draw.
        shape: Of the interval of a bounded metric.
        bounds: Values that the metric cannot leave.
        ceiling: What the best scores could give.
        higher_is_better: Which way is good.
        per_test: Whether ``values`` are of the same test examples for all scores of a world.
    """
    value = float(np.sort(estimate.values).mean())  # sorted: the order of tests cannot matter
    found = spread(estimate, value)
    if shape is None:
        ends = _drawn(found, value, bootstrap)
    else:
        ends = shape.ends(value, found, bootstrap.confidence)
    low, high = (min(max(end, bounds[0]), bounds[1]) for end in ends)
    return MetricResult(
        value=value,
        low=min(low, value),
        high=max(high, value),
        chance=chance,
        confidence=bootstrap.confidence,
        ceiling=ceiling,
        higher_is_better=higher_is_better,
        per_test=tuple(map(float, estimate.values)) if per_test else None,
        bounds=None if bounds == UNBOUNDED else bounds,
    )


def _drawn(found: Spread, value: float, bootstrap: Bootstrap) -> tuple[float, float]:
    """Return the ends of the interval of a metric without bounds."""
    if found.variance == 0:
        return value, value
    tail = (1 - bootstrap.confidence) / 2
    student = float(stats.t.ppf(tail, found.freedom)) * math.sqrt(found.variance)
    if min(map(len, found.effects)) < FEW:
        return value + student, value - student
    # the variance of the draws below
    drawn = sum(float(e @ e) / len(e) ** 2 for e in found.effects)
    stretch = student / float(stats.norm.ppf(tail)) / math.sqrt(drawn)
    random = np.random.default_rng(bootstrap.seed)
    draws = np.zeros(bootstrap.resamples)
    for effects in found.effects:
        draws += _drawn_means(effects, bootstrap.resamples, random)
    low, high = np.percentile(draws, [100 * tail, 100 * (1 - tail)])
    return value + float(low) * stretch, value + float(high) * stretch


def _drawn_means(effects: Array, resamples: int, random: np.random.Generator) -> Array:
    """Return the mean of as many effects as there are, drawn with replacement, ``[resamples]``."""
    if len(effects) > GROUPS:
        effects = random.permutation(effects)
        starts = np.linspace(0, len(effects), GROUPS, endpoint=False).astype(int)
        effects = np.add.reduceat(effects, starts) * (GROUPS / len(effects))
    drawn = random.integers(0, len(effects), (resamples, len(effects)))
    means: Array = effects[drawn].mean(axis=1)
    return means
