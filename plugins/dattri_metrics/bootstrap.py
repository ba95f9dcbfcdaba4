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

Array = np.ndarray[Any, Any]
GROUPS = 2000  # more rows than these are put into so many random groups, which are then drawn
UNBOUNDED = (-math.inf, math.inf)


@frozen
class Bootstrap:
    """How an interval is drawn.

    Args:
        resamples: Bootstrap draws.
        confidence: Share of the draws inside the interval, between 0 and 1.
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


@frozen(eq=False)
class Estimate:
    """A number for each test, and how it moves with the rows that it is computed from.

    Args:
        values: ``[m]``.
        influence: ``[rows, m]``: the derivative of ``values`` when row s gets more weight, times
            the number of rows; each column has mean 0. None where rows are no sample.
    """

    values: Array
    influence: Array | None


def summary(
    estimate: Estimate,
    chance: float,
    bootstrap: Bootstrap,
    *,
    bounds: tuple[float, float] = UNBOUNDED,
    ceiling: float | None = None,
    higher_is_better: bool = True,
    per_test: bool = False,
) -> MetricResult:
    """Return the mean over tests with its interval.

    The interval is a bootstrap over tests and over rows. To first order the mean moves by

        mean over drawn rows s of a_s + mean over drawn tests j of b_j,

    with a_s the mean over tests of ``influence[s]`` and b_j = values_j - their mean. Rows and tests
    are drawn with replacement, independently, and the draws are stretched so that their variance is

        V = V_rows + V_tests - V_both, each the mean square / (count - 1), of a, of b, and of what
        remains of ``influence`` without a over all rows x tests,

    which is unbiased for two crossed samples (the analysis of variance with random effects; V_both
    is in each of the other two), and by the ratio of Student's to the normal quantile, with
    Satterthwaite's degrees of freedom.

    Why not resample and compute again: a drawn subset that comes up twice is a tie, which a rank
    correlation takes for knowledge, and drawing rows and tests together counts V_both three times
    (Owen 2007, arXiv 0708.0432). Of LDS at 95 %, in nine populations of 10 to 50 subsets and 10 to
    200 tests, these intervals held the truth in 94 to 98 % of 900 simulations each. Resampling held
    it in 90 to 100 % of 300, with intervals up to 1.4 times as wide.

    Args:
        estimate: Of the metric. With one test, or without ``influence``, only the other is drawn.
        chance: What scores without information give.
        bootstrap: How to draw.
        bounds: Values that the metric cannot leave.
        ceiling: What the best scores could give.
        higher_is_better: Which way is good.
        per_test: Whether ``values`` are of the same test examples for all scores of a world.
    """
    value = float(np.sort(estimate.values).mean())  # sorted: the order of tests cannot matter
    spread = _spread(estimate, value, bootstrap)
    low, high = (min(max(value + end, bounds[0]), bounds[1]) for end in spread)
    return MetricResult(
        value=value,
        low=min(low, value),
        high=max(high, value),
        chance=chance,
        confidence=bootstrap.confidence,
        ceiling=ceiling,
        higher_is_better=higher_is_better,
        per_test=tuple(map(float, estimate.values)) if per_test else None,
    )


def _spread(estimate: Estimate, value: float, bootstrap: Bootstrap) -> tuple[float, float]:
    """Return the ends of the interval, relative to the value."""
    effects = []  # sorted, so that the order of rows or tests cannot matter
    moves = estimate.influence
    if len(estimate.values) > 1:
        effects.append(np.sort(estimate.values - value))
    if moves is not None and len(moves) > 1:
        effects.append(np.sort(moves.mean(axis=1)))
    variances = [float(e @ e) / (len(e) - 1) / len(e) for e in effects]
    variance = sum(variances)
    if variance <= 1e-24 * max(1.0, value * value):  # of rounding, not of data
        return 0.0, 0.0
    if moves is not None and len(effects) == 2:
        rest = moves - moves.mean(axis=1, keepdims=True)
        cells = (len(moves) - 1) * (moves.shape[1] - 1)
        variance -= float(np.square(rest).sum()) / cells / moves.size
        variance = max(variance, *variances)
    freedom = variance**2 / sum(
        v**2 / (len(e) - 1) for v, e in zip(variances, effects, strict=True)
    )
    tail = (1 - bootstrap.confidence) / 2
    drawn = sum(float(e @ e) / len(e) ** 2 for e in effects)  # the variance of the draws below
    stretch = math.sqrt(variance / drawn) * stats.t.ppf(tail, freedom) / stats.norm.ppf(tail)
    random = np.random.default_rng(bootstrap.seed)
    draws = np.zeros(bootstrap.resamples)
    for e in effects:
        draws += _drawn_means(e, bootstrap.resamples, random)
    low, high = np.percentile(draws, [100 * tail, 100 * (1 - tail)])
    return float(low * stretch), float(high * stretch)


def _drawn_means(effects: Array, resamples: int, random: np.random.Generator) -> Array:
    """Return the mean of as many effects as there are, drawn with replacement, ``[resamples]``."""
    if len(effects) > GROUPS:
        effects = random.permutation(effects)
        starts = np.linspace(0, len(effects), GROUPS, endpoint=False).astype(int)
        effects = np.add.reduceat(effects, starts) * (GROUPS / len(effects))
    drawn = random.integers(0, len(effects), (resamples, len(effects)))
    means: Array = effects[drawn].mean(axis=1)
    return means
