"""Average precision of columns: how well each ranks the positive rows first."""

from __future__ import annotations

from typing import Any

import numpy as np

from dattri_metrics.ranks import Ranks, running
from dattri_metrics.spread import Estimate

Array = np.ndarray[Any, Any]


def precisions(scores: Array, positive: Array, strata: Array | None = None) -> Estimate:
    """Return the average precision of each column, and its influence function.

        AP = (1 / p) sum over positive i of T_i / N_i,

    N_i the number of rows that score at least as much as i, and T_i the positive ones among them.
    Equal scores enter together: a tie counts as if the others of the group were all looked at, as
    scikit-learn has it.

    Args:
        scores: ``[n, m]``, high first.
        positive: ``[n, m]`` truth values, at least one in each column.
        strata: ``[n]``, groups of rows, for the interval; see `Estimate`.
    """
    ranks = Ranks.of(-scores)
    found = ranks.gather(positive).astype(np.float64)
    count = found.sum(axis=0)
    seen = ranks.last + 1.0
    hits = np.take_along_axis(running(found), ranks.last + 1, axis=0)
    values = (found * hits / seen).sum(axis=0) / count
    # a row moves the precision at every positive that it is not below
    per_seen, per_square = running(found / seen), running(found * hits / seen**2)
    passed, cost = (
        sums[-1] - np.take_along_axis(sums, ranks.first, axis=0) for sums in (per_seen, per_square)
    )
    own = found * (hits / seen - values)
    moved = len(scores) / count * (own + found * passed - cost)
    return Estimate(values, ranks.scatter(moved), strata)


def expected_precision(n: int, positives: Array) -> Array:
    """Return the mean average precision of n rows in random order, for counts of positives.

        (H_n (n - p) / (n - 1) + n (p - 1) / (n - 1)) / n, with H_n = 1 + 1/2 + ... + 1/n

    More than the share p / n, which it approaches for many rows. For ``n`` of 2 or more.
    """
    harmonic = (1 / np.arange(1, n + 1)).sum()
    p = np.asarray(positives, dtype=np.float64)
    expected: Array = (harmonic * (n - p) + n * (p - 1)) / (n - 1) / n
    return expected
