"""The k highest of each column, where ties share the last places."""

from __future__ import annotations

from typing import Any

import numpy as np

from dattri_core import InputError

Array = np.ndarray[Any, Any]


def top(scores: Array, k: int) -> Array:
    """Return the chance of each row to be among the k highest when ties are broken at random.

    Args:
        scores: ``[n, m]``.
        k: From 1 to n.

    Returns:
        ``[n, m]`` from 0 to 1; each column adds up to k.
    """
    bound = np.partition(scores, len(scores) - k, axis=0)[len(scores) - k]
    above, equal = scores > bound, scores == bound
    share = (k - above.sum(axis=0)) / equal.sum(axis=0)
    chances: Array = above + equal * share
    return chances


def check_k(metric: str, k: int, n: int) -> None:
    """Refuse a k that says nothing.

    Raises:
        InputError: It is below 1, or no train example is left out.
    """
    if not 1 <= k < n:
        raise InputError(f"{metric}: k is {k} of {n} train examples; give 1 to {n - 1}")
