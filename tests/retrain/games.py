"""Games with known semivalues, and the sum over all 2^n sets."""

from __future__ import annotations

import math

import numpy as np


def all_masks(n):
    return ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(bool)


def enumerate_semivalue(utility, n, weights):
    """phi_i = sum_S w_(|S| + 1) (U(S and i) - U(S)) |S|! (n - 1 - |S|)! / n!, over S without i."""
    masks = all_masks(n)
    utilities = np.asarray(utility(masks))
    sizes = masks.sum(1)
    values = np.zeros((n, utilities.shape[1]))
    for i in range(n):
        for code in range(2**n):
            if not masks[code, i]:
                s = int(sizes[code])
                chance = math.factorial(s) * math.factorial(n - 1 - s) / math.factorial(n)
                values[i] += weights[s] * chance * (utilities[code | 1 << i] - utilities[code])
    return values


def enumerate_banzhaf(utility, n):
    masks = all_masks(n)
    utilities = np.asarray(utility(masks))
    return np.stack(
        [utilities[masks[:, i]].mean(0) - utilities[~masks[:, i]].mean(0) for i in range(n)]
    )


class Additive:
    """U_j(S) = sum_(i in S) w_ij: every semivalue is w."""

    def __init__(self, n, m=2, seed=0):
        self.w = np.random.default_rng(seed).normal(size=(n, m))

    def __call__(self, masks):
        return masks @ self.w

    def shapley(self):
        return self.w


class Majority:
    """U(S) = 1 when more than half are in S: the Shapley value is 1 / n."""

    def __init__(self, n):
        self.n = n

    def __call__(self, masks):
        return (masks.sum(1) > self.n / 2).astype(float)[:, None]

    def shapley(self):
        return np.full((self.n, 1), 1 / self.n)


class Airport:
    """U(S) = the largest cost in S; a runway of the k-th cost is shared by those who need it."""

    def __init__(self, costs):
        self.costs = np.asarray(costs, dtype=float)

    def __call__(self, masks):
        return np.where(masks, self.costs, 0.0).max(1)[:, None]

    def shapley(self):
        order = np.argsort(self.costs)
        steps = np.diff(self.costs[order], prepend=0.0)
        shares = np.cumsum(steps / np.arange(len(order), 0, -1))
        values = np.empty(len(order))
        values[order] = shares
        return values[:, None]


def random_game(n, m, seed):
    table = np.random.default_rng(seed).normal(size=(2**n, m))
    codes = 2 ** np.arange(n)
    return lambda masks: table[masks @ codes]
