"""Intervals of bounded metrics: they stay inside, and an extreme value has one with a width.

A number near its bound varies little by the looks of it: ten suspects that are all found first show
no variance, and neither do ten others. The variance is therefore not what was seen alone, and it is
not the same over the interval: it falls towards the bound.
"""

from __future__ import annotations

import math

from attrs import frozen
from scipy import optimize, stats
from typing_extensions import Protocol

from dattri_metrics.spread import Spread

PRIOR = 4.0
"""Degrees of freedom that a variance which is known from theory counts beside the one seen."""


class Shape(Protocol):
    """How an interval follows from a value and its variance."""

    def ends(self, value: float, spread: Spread, confidence: float) -> tuple[float, float]:
        """Return the ends of the interval."""
        ...


@frozen
class Proportion:
    """Of a mean of numbers from ``low`` to ``high``: Wilson's interval for a count of trials.

    Scaled to 0 to 1, it is all theta with

        (value - theta)^2 <= t^2 c theta (1 - theta) / trials

    (Wilson 1927), with c the ratio of the variance seen to ``value (1 - value) / trials``,
    moderated by that which theory expects (Smyth 2004, section 3):

        c = (d0 + d v trials / (value (1 - value))) / (d0 + d),

    d0 = 4, d the degrees of freedom of v, t Student's quantile of d0 + d. Where no variance was
    seen, at the bounds or with one test, c = 1 and d = 0.

    Args:
        trials: Independent values of 0 and 1 that would be as uncertain.
        low: Least value.
        high: Largest value.
        most: Whether no such number can be more uncertain than ``trials`` values of 0 and 1, as a
            mean of so many independent numbers: then Wilson's own interval is the widest.
    """

    trials: float
    low: float = 0.0
    high: float = 1.0
    most: bool = False

    def ends(self, value: float, spread: Spread, confidence: float) -> tuple[float, float]:
        """Return the ends of the interval."""
        width = self.high - self.low
        theta = min(max((value - self.low) / width, 0.0), 1.0)
        inside, freedom = theta * (1 - theta), spread.freedom
        ratio = 1.0
        if inside > 0 and freedom > 0:
            seen = spread.variance / width**2 * self.trials / inside
            ratio = (PRIOR + freedom * seen) / (PRIOR + freedom)
        else:
            freedom = 0.0
        tail = (1 - confidence) / 2
        squared = ratio * float(stats.t.ppf(tail, PRIOR + freedom)) ** 2
        if self.most:
            squared = min(squared, float(stats.norm.ppf(tail)) ** 2)
        c = squared / self.trials
        middle, half = theta + c / 2, math.sqrt(c * (inside + c / 4))
        low, high = (middle - half) / (1 + c), (middle + half) / (1 + c)
        return self.low + width * low, self.low + width * high


@frozen
class Correlation:
    """Of a mean of correlations over rows: Student's interval for Fisher's z = atanh(value).

    The mean of rank correlations of few rows is nearer to 0 than that of many (Kendall 1948;
    Moran 1948):

        E r = rho - 3 (rho - tau) / (rows + 1)

    with tau Kendall's correlation, here that of a normal pair with the same rho. Many tests make
    the interval so narrow that this matters: the end away from 0 is that around the rho whose mean
    the value is.

    Where every correlation is 1, nothing varies. The interval is then that of the largest rank
    correlation below 1, one pair of neighbours exchanged, 1 - 12 / (rows^3 - rows), by the variance
    of one normal pair, (1 + value^2 / 2) / (rows - 3) on the scale of z (Bonett and Wright 2000).
    With three rows it is everything.

    Args:
        rows: That each correlation is over.
        ranks: Whether it is Spearman's.
    """

    rows: int
    ranks: bool

    def ends(self, value: float, spread: Spread, confidence: float) -> tuple[float, float]:
        """Return the ends of the interval."""
        n = self.rows
        below = 1 - 12 / (n**3 - n)
        variance, freedom, middle = spread.variance, spread.freedom, value
        if variance == 0 and abs(value) < below:
            return value, value  # scores of no variation count 0 whatever the rows
        if variance == 0 or abs(value) >= 1:
            if n <= 3:
                return -1.0, 1.0
            value = middle = math.copysign(below, value)
            variance = (1 - value * value) ** 2 * (1 + value * value / 2) / (n - 3)
            freedom = n - 1.0
        elif not math.isfinite(variance):
            return -1.0, 1.0
        elif self.ranks:
            middle = _without_bias(value, n)
        t = -float(stats.t.ppf((1 - confidence) / 2, freedom))
        half = t * math.sqrt(variance) / (1 - value * value)
        low, high = sorted((value, middle))
        return math.tanh(math.atanh(low) - half), math.tanh(math.atanh(high) + half)


def _without_bias(value: float, rows: int) -> float:
    """Return the rank correlation whose mean over samples of so many rows is the value."""

    def excess(rho: float) -> float:
        tau = 2 / math.pi * math.asin(min(1.0, 2 * math.sin(math.pi * rho / 6)))
        return rho - 3 * (rho - tau) / (rows + 1) - abs(value)

    found = float(optimize.brentq(excess, abs(value), 1.0)) if abs(value) > 0 else 0.0
    return math.copysign(min(found, 1 - 1e-12), value)
