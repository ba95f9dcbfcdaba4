"""Semivalues by permutations: Monte-Carlo Shapley, its truncated form, and Beta-Shapley."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from attrs import define, field
from scipy.special import betaln, gammaln

from dattri_core import InputError, RandomStream
from dattri_retrain.estimate import Estimate, Game, Stopping, Utility, finish, standard_error

Array = np.ndarray[Any, Any]
ROUND = 10
"""Permutations that are drawn at once; the rule to stop is asked after each round."""
LEAST = 20
"""Permutations before a standard error is trusted."""


def beta_weights(n: int, alpha: float = 1.0, beta: float = 1.0) -> Array:
    """Return how much a marginal contribution at each place of a permutation counts, ``[n]``.

    w_j = n C(n - 1, j - 1) B(j + beta - 1, n - j + alpha) / B(alpha, beta) for the j-th example of
    a permutation, which joins j - 1 others; their mean is 1. alpha = beta = 1 gives 1 everywhere,
    the Shapley value; a large alpha counts small sets more, a large beta large ones.

    Source: Kwon and Zou 2021, Beta Shapley: a Unified and Noise-reduced Data Valuation Framework
    for Machine Learning (arXiv 2110.14049), section 3.2.
    """
    if n < 1 or not (alpha > 0 and beta > 0):
        raise InputError(
            f"beta weights: n = {n}, alpha = {alpha}, beta = {beta}; expected n of 1 or more and "
            "both above 0"
        )
    j = np.arange(1, n + 1)
    choose = gammaln(n) - gammaln(j) - gammaln(n - j + 1)
    log = np.log(n) + choose + betaln(j + beta - 1, n - j + alpha) - betaln(alpha, beta)
    weights: Array = np.exp(log)
    return weights


def semivalue(
    utility: Utility,
    n: int,
    *,
    weights: Array | None = None,
    truncation: float | None = None,
    stopping: Stopping | None = None,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Estimate:
    """Return semivalues of a game, from random permutations.

    phi_i = E_pi[w_(place of i) (U(those before i, and i) - U(those before i))]

    Permutation k depends on (n, seed, k) alone, so a larger budget goes on where a smaller one
    ended, and asks for the same sets again first.

    Args:
        utility: The game, masks ``[B, n]`` to ``[B, m]``; also of the empty set.
        n: Number of examples.
        weights: ``[n]``, how much a contribution at each place counts; mean 1. None: 1, the
            Shapley value. See `beta_weights`.
        truncation: Once no utility of a permutation's first sets is further than this from that of
            all examples, its other examples contribute 0, and are not asked for. None: never.
        stopping: When to stop; by default after 10,000 sets.
        seed: Of the permutations.
        advance: Told how many sets were asked for.

    Raises:
        InputError: There are under two examples, the budget is too small for the first
            permutations, or an argument is malformed.

    Source: Castro et al. 2009, Polynomial calculation of the Shapley value based on sampling;
    Ghorbani and Zou 2019, Data Shapley (arXiv 1904.02868), algorithm 1, for the truncation.
    """
    stopping = stopping or Stopping()
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if n < 2 or w.shape != (n,):
        raise InputError(
            f"semivalue: {n} examples and weights of shape {w.shape}; expected 2 examples or more "
            f"and a weight for each place, ({n},)"
        )
    if truncation is not None and not truncation >= 0:
        raise InputError(f"semivalue: truncation is {truncation}, expected 0 or more, or None")
    least = LEAST if truncation is None else 2
    if stopping.budget < 2 + least * (n - 1):
        raise InputError(
            f"semivalue: a budget of {stopping.budget} sets is below {least} permutations of {n} "
            f"examples, which ask for {2 + least * (n - 1)}; raise the budget, set a truncation, "
            "or take Banzhaf values, which use every set for every example"
        )
    game = Game(utility, n)
    told = advance or (lambda _: None)
    empty, whole = game(np.array([np.zeros(n, np.bool_), np.ones(n, np.bool_)]))
    told(2)
    walk = _Walk(game, w, truncation, empty, whole, told)
    sums = _Sums(np.zeros((n, len(whole))))
    stream = RandomStream(seed, "permutations")
    while True:
        count = min(ROUND, (stopping.budget - walk.evaluations) // (n - 1))
        if count == 0:
            return finish(*sums.result(), sums.draws, walk.evaluations, "budget")
        numbers = range(sums.draws, sums.draws + count)
        sums.add(walk.contributions(np.stack([_permutation(stream, n, k) for k in numbers])))
        if sums.draws >= LEAST and stopping.tolerance is not None:
            values, errors = sums.result()
            if errors.max() <= stopping.tolerance:
                return finish(values, errors, sums.draws, walk.evaluations, "tolerance")


def _permutation(stream: RandomStream, n: int, number: int) -> Array:
    return np.random.Generator(np.random.PCG64(stream.key(n, number))).permutation(n)


@define(eq=False)
class _Walk:
    """Asks for the sets along permutations."""

    game: Game
    weights: Array  # [n]
    truncation: float | None
    empty: Array  # [m + 1]
    whole: Array  # [m + 1]
    told: Callable[[int], None]
    evaluations: int = 2

    def contributions(self, orders: Array) -> Array:
        """Return what each example adds in permutations ``[B, n]``, ``[B, n, m + 1]``.

        They are walked side by side, so that models of sets of one size can be trained together.
        """
        count, n = orders.shape
        gains = np.zeros((count, n, len(self.empty)))
        masks = np.zeros((count, n), np.bool_)
        utilities = np.tile(self.empty, (count, 1))
        rows = np.arange(count)
        for place in range(n):
            active = self._far(utilities)
            if not active.any():
                break
            masks[rows, orders[:, place]] = True
            after = self.whole if place == n - 1 else self._ask(masks[active])
            chosen = rows[active]
            gain = self.weights[place] * (after - utilities[chosen])
            gains[chosen, orders[chosen, place]] = gain
            utilities[chosen] = after
        return gains

    def _far(self, utilities: Array) -> Array:
        """Return which permutations are still far from the utility of all examples, ``[B]``."""
        if self.truncation is None:
            return np.ones(len(utilities), np.bool_)
        far: Array = np.abs(utilities - self.whole).max(1) > self.truncation
        return far

    def _ask(self, masks: Array) -> Array:
        self.evaluations += len(masks)
        self.told(len(masks))
        return self.game(masks)


@define(eq=False)
class _Sums:
    """Adds up contributions, as deviations from those of the first permutation."""

    base: Array  # [n, m + 1]
    draws: int = 0
    total: Array = field(init=False)  # [n, m + 1], sum of deviations
    squares: Array = field(init=False)  # [n, m + 1]
    spread: Array = field(init=False)  # [m + 1], the largest deviation

    def __attrs_post_init__(self) -> None:
        self.total, self.squares = np.zeros(self.base.shape), np.zeros(self.base.shape)
        self.spread = np.zeros(self.base.shape[1])

    def add(self, gains: Array) -> None:
        """Add contributions ``[B, n, m + 1]``."""
        if self.draws == 0:
            self.base = gains[0]
        for gain in gains:
            deviation = gain - self.base
            self.total += deviation
            self.squares += deviation**2
            self.spread = np.maximum(self.spread, np.abs(deviation).max(0))
        self.draws += len(gains)

    def result(self) -> tuple[Array, Array]:
        """Return values and standard errors, each ``[n, m + 1]``."""
        values = self.base + self.total / self.draws
        squares = self.squares - self.total**2 / self.draws
        return values, standard_error(squares, self.draws, self.spread)
