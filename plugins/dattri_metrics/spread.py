"""How far a mean over tests moves with other tests and other rows: its variance, and how sure."""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import frozen

Array = np.ndarray[Any, Any]
NOTHING = 1e-24
"""A variance below this share of the squared value is of rounding, not of data."""


@frozen(eq=False)
class Estimate:
    """A number for each test, and how it moves with the rows that it is computed from.

    Args:
        values: ``[m]``.
        influence: ``[rows, m]``: the derivative of ``values`` when row s gets more weight, times
            the number of rows; each column has mean 0. None where rows are no sample.
        strata: ``[rows]``: the group of each row, where rows of different groups play different
            parts: mislabelled and correct examples. One group by default.
        fitted: Numbers, such as means and variances, that each value is scaled by and that the rows
            themselves gave: so many rows count less.
    """

    values: Array
    influence: Array | None
    strata: Array | None = None
    fitted: int = 0


@frozen(eq=False)
class Spread:
    """The variance of a mean over tests.

    Args:
        variance: 0 where nothing varies; infinite where too few rows were seen to say.
        freedom: Degrees of freedom of the variance; 0 where it was not seen.
        effects: What is drawn, each with mean 0: tests, and rows.
    """

    variance: float
    freedom: float
    effects: tuple[Array, ...]


def spread(estimate: Estimate, value: float) -> Spread:
    """Return the variance of the mean over tests.

    To first order the mean moves by

        mean over rows s of a_s + mean over tests j of b_j,

    with a_s the mean over tests of ``influence[s]`` and b_j = values_j - their mean. Then

        V = V_rows + V_tests - V_both, each the mean square / (count - 1), of a, of b, and of what
        remains of ``influence`` without a over all rows x tests,

    which is unbiased for two crossed samples (the analysis of variance with random effects; V_both
    is in each of the other two). Degrees of freedom are Satterthwaite's.

    Groups of rows count apart, each with its own size less 1: the variance of an AUROC is DeLong's
    (1988). How many rows fall into each group is a sample too. Near a bound most effects are equal
    and a few exceptions carry the variance, which is then as uncertain as they are few. Degrees of
    freedom of proportions, which are without influence or with groups, are therefore those of the
    variance of k numbers with kurtosis K,

        2 k / (K - (k - 3) / (k - 1)), at most k - 1

    (2 / the squared relative error of the variance; for normal numbers k - 1).

    Args:
        estimate: With one test, or without ``influence``, only the other is a sample.
        value: The mean of its values.
    """
    effects = []  # sorted, so that the order of rows or tests cannot matter
    parts: list[tuple[float, float]] = []  # variance and degrees of freedom
    moves = estimate.influence
    proportion = moves is None or estimate.strata is not None
    m = len(estimate.values)
    if m > 1:
        effects.append(np.sort(estimate.values - value))
        freedom = _freedom(effects[0]) if proportion else m - 1
        parts.append((_mean_square(effects[0], 1) / m, freedom))
    of_tests = sum(v for v, _ in parts)
    if moves is not None and len(moves) > 1:
        effects.append(np.sort(moves.mean(axis=1)))
        parts.extend(_of_rows(moves.mean(axis=1), estimate.strata, estimate.fitted))
    variance = sum(v for v, _ in parts)
    if variance <= NOTHING * max(1.0, value * value):
        return Spread(0.0, 0.0, tuple(effects))
    of_rows = variance - of_tests
    if moves is not None and m > 1 and len(effects) == 2 and np.isfinite(variance):
        rest = moves - moves.mean(axis=1, keepdims=True)
        cells = (len(moves) - 1) * (m - 1)
        both = float(np.square(rest).sum()) / cells / moves.size
        variance = max(variance - both, of_tests, of_rows)
    unseen = any(freedom == 0 for _, freedom in parts)
    freedom = 0.0 if unseen else variance**2 / sum(v**2 / f for v, f in parts)
    return Spread(variance, freedom, tuple(effects))


def _of_rows(effects: Array, strata: Array | None, fitted: int) -> list[tuple[float, float]]:
    """Return the variance of the mean of row effects in parts, each with its freedom."""
    n = len(effects)
    if strata is None:
        left = n - 1 - fitted
        return [(_mean_square(np.sort(effects), 1 + fitted) / n if left > 0 else np.inf, left)]
    parts, between = [], 0.0
    for group in np.unique(strata):
        one = np.sort(effects[strata == group])
        share, mean = len(one) / n, float(one.mean())
        between += share * mean**2
        # of a group of one nothing is seen: no variance, no freedom
        own = _mean_square(one - mean, 1) if len(one) > 1 else 0.0
        parts.append((share**2 * own / len(one), _freedom(one - mean)))
    return [*parts, (between / n, float(n - 1))]


def _freedom(effects: Array) -> float:
    """Return the degrees of freedom of the variance of numbers with mean 0, of any kurtosis."""
    k, square = len(effects), float(effects @ effects)
    if square == 0:
        return k - 1.0  # nothing to add to the variance, and not unseen
    kurtosis = k * float(np.square(effects) @ np.square(effects)) / square**2
    return min(k - 1.0, 2 * k / (kurtosis - (k - 3) / (k - 1))) if k > 1 else 0.0


def _mean_square(effects: Array, less: int) -> float:
    return float(effects @ effects) / (len(effects) - less)
