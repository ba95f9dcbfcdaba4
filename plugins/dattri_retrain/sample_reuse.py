"""Banzhaf values by maximum sample reuse, and exact leave-one-out values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dattri_core import InputError, RandomStream
from dattri_retrain.estimate import Estimate, Game, Stopping, Utility, finish, standard_error

Array = np.ndarray[Any, Any]
ROUND = 50
"""Subsets that are drawn at once; the rule to stop is asked after each round."""
LEAST = 100
"""Subsets before a standard error is trusted."""


def banzhaf(
    utility: Utility,
    n: int,
    *,
    stopping: Stopping | None = None,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Estimate:
    """Return Banzhaf values of a game; every subset counts for every example.

    phi_i = E[U(S) | i in S] - E[U(S) | i not in S], S with every example by a fair coin.

    Subset k depends on (n, seed, k) alone. Values have the error of two means of utilities, which
    falls with the square root of the number of subsets, whatever n.

    Args:
        utility: The game, masks ``[B, n]`` to ``[B, m]``; also of the empty set.
        n: Number of examples.
        stopping: When to stop; by default after 10,000 sets.
        seed: Of the subsets.
        advance: Told how many sets were asked for.

    Raises:
        InputError: The budget is below 100 sets.

    Source: Wang and Jia 2023, Data Banzhaf: A Robust Data Valuation Framework for Machine Learning
    (arXiv 2205.15466), section 5, the maximum-sample-reuse estimator.
    """
    stopping = stopping or Stopping()
    if stopping.budget < LEAST:
        raise InputError(
            f"banzhaf: a budget of {stopping.budget} sets is below {LEAST}, the least for a "
            "standard error"
        )
    game = Game(utility, n)
    stream = RandomStream(seed, "subsets")
    draws = 0
    sums: _Sums | None = None
    while True:
        count = min(ROUND, stopping.budget - draws)
        masks = np.stack([_subset(stream, n, k) for k in range(draws, draws + count)])
        utilities = game(masks)
        sums = sums or _Sums(n, utilities)
        sums.add(masks, utilities)
        draws += count
        if advance is not None:
            advance(count)
        if draws < LEAST or not sums.both_sides:
            if draws >= stopping.budget:
                raise InputError(
                    f"banzhaf: in {draws} subsets some example was drawn less than twice on one "
                    "side; raise the budget"
                )
            continue
        values, errors = sums.result()
        if stopping.tolerance is not None and errors.max() <= stopping.tolerance:
            return finish(values, errors, draws, draws, "tolerance")
        if draws >= stopping.budget:
            return finish(values, errors, draws, draws, "budget")


def _subset(stream: RandomStream, n: int, number: int) -> Array:
    random = np.random.Generator(np.random.PCG64(stream.key(n, number)))
    return random.integers(0, 2, n, dtype=np.int8).astype(np.bool_)


class _Sums:
    """Sums of utilities with and without each example, as deviations from their first mean."""

    def __init__(self, n: int, first: Array) -> None:
        m = first.shape[1]
        self.base = first.mean(0)
        self.count = np.zeros((2, n))
        self.total, self.squares = np.zeros((2, n, m)), np.zeros((2, n, m))
        self.spread = np.zeros(m)

    def add(self, masks: Array, utilities: Array) -> None:
        """Add subsets ``[B, n]`` and their utilities ``[B, m]``."""
        deviations = utilities - self.base
        self.spread = np.maximum(self.spread, np.abs(deviations).max(0))
        for side, chosen in enumerate((~masks, masks)):
            weights = chosen.astype(np.float64).T
            self.count[side] += weights.sum(1)
            self.total[side] += weights @ deviations
            self.squares[side] += weights @ deviations**2

    @property
    def both_sides(self) -> bool:
        """Return whether every example was in two subsets and out of two."""
        return bool(self.count.min() >= 2)

    def result(self) -> tuple[Array, Array]:
        """Return values and standard errors, each ``[n, m]``."""
        count = self.count[:, :, None]
        means = self.total / count
        squares = self.squares - self.total * means
        out, within = (standard_error(squares[side], count[side], self.spread) for side in (0, 1))
        return means[1] - means[0], np.hypot(out, within)


def leave_one_out_values(utility: Utility, n: int) -> Estimate:
    """Return phi_i = U(all) - U(all but i), exactly, from n + 1 sets.

    Args:
        utility: The game, masks ``[B, n]`` to ``[B, m]``.
        n: Number of examples.
    """
    game = Game(utility, n)
    masks = np.ones((n + 1, n), np.bool_)
    masks[np.arange(n), np.arange(n)] = False
    utilities = game(masks)
    values = utilities[-1] - utilities[:-1]
    return finish(values, np.zeros_like(values), n + 1, n + 1, "exact")
