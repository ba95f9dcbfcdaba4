"""Shapley values of games that depend on the nearest K of the rows at hand, in closed form.

All games: rows 1 ... n from the nearest to the farthest, and a utility v(S) that sees the K nearest
rows of S. Two rows next to each other differ by what one does in the other's place, over all sets
without both; where every row is in such a set with probability u, uniform in [0, 1], the sets have
their Shapley weights.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def additive_values(gains: Tensor, neighbours: int) -> Tensor:
    """Return the values of v(S) = 1/K sum of the gains of the K nearest rows of S.

    s_i - s_(i+1) = (g_i - g_(i+1)) min(K, i) / (K i) and s_n = g_n min(K, n) / (K n); summed by
    parts, s_i = g_i / max(K, i - 1) - sum_(j >= i, j > K) g_j / (j (j - 1)). Source: Jia et al.
    2019, theorem 1 (arXiv 1908.08619), where a gain is 1 or 0; any number will do.

    Args:
        gains: From the nearest row to the farthest, float64, ``[C, n]``.
        neighbours: K, which may be more than n.
    """
    rank = _ranks(gains)
    once = 1 / torch.where(rank > neighbours, rank - 1, neighbours)
    later = torch.where(rank > neighbours, -1 / (rank * (rank - 1)).clamp_min(1), 0)
    return _from_here(gains * later).addcmul_(gains, once)


def squared_values(gains: Tensor, answer: Tensor, neighbours: int) -> Tensor:
    """Return the values of v(S) = -(1/K sum of the gains of the K nearest rows of S - y)^2.

    With q_i = min(K, i), s_i - s_(i+1) = -(g_i - g_(i+1)) / K times
    (q_i / i) ((g_i + g_(i+1)) / K - 2 y) + 2/K [q_i (q_i - 1) / (2 i (i - 1)) sum_(l < i) g_l
    + sum_(l > i + 1) q_(l-1) (q_(l-1) - 1) / (2 (l - 1) (l - 2)) g_l], and s_n is that with g_(n+1)
    = 0. Source: Jia et al. 2019 (arXiv 1908.08619), here also for K > n.

    Args:
        gains: From the nearest row to the farthest, float64, ``[C, n]``.
        answer: y, float64, ``[C, 1]``.
        neighbours: K, which may be more than n.
    """
    rank = _ranks(gains)
    seen = rank.clamp_max(neighbours)
    pair = seen * (seen - 1) / (2 * rank * (rank - 1)).clamp_min(1)  # of i and one before it
    following = torch.nn.functional.pad(gains[:, 1:], (0, 1))
    before = gains.cumsum(1) - gains
    # Row l stands at rank l - 1 of the sets in question: one of i and i + 1 is missing.
    shifted = torch.nn.functional.pad(gains[:, 1:] * pair[:-1], (1, 0))
    after = torch.nn.functional.pad(_from_here(shifted)[:, 2:], (0, min(2, gains.shape[1])))
    inner = ((gains + following) / neighbours - 2 * answer) * (seen / rank)
    inner += (before * pair + after) * (2 / neighbours)
    return _from_here((following - gains) / neighbours * inner)


def mean_values(gains: Tensor, empty: float, neighbours: int) -> Tensor:
    """Return the values of v(S) = mean gain of the K nearest rows of S, v of none = ``empty``.

    With q = min(K, n - 1) and H_q = 1 + 1/2 + ... + 1/q, s_i - s_(i+1) = (g_i - g_(i+1))
    [H_q / (n - 1) + (min(K, i) / i - q / (n - 1)) / K], and s_n = 1/n [g_n - empty
    + (H_min(K, n) - 1) (g_n - mean of the other gains)]. Source: Wang and Jia 2023 (arXiv
    2304.04258).

    Args:
        gains: From the nearest row to the farthest, float64, ``[C, n]``.
        empty: Utility of no rows.
        neighbours: K, which may be more than n.
    """
    count = gains.shape[1]
    harmonic = _harmonic(gains)
    last = gains[:, -1:]
    others = (gains.sum(1, keepdim=True) - last) / max(1, count - 1)
    surplus = harmonic[min(neighbours, count)] - 1
    ends = (last - empty + surplus * (last - others)) / count
    if count == 1:
        return ends
    rank, some = _ranks(gains)[:-1], min(neighbours, count - 1)
    factor = (rank.clamp_max(neighbours) / rank - some / (count - 1)) / neighbours
    factor = factor + harmonic[some] / (count - 1)
    steps = (gains[:, :-1] - gains[:, 1:]) * factor
    return _from_here(torch.cat([steps, ends], 1))


def equal_values(gains: Tensor, inside: Tensor, empty: float) -> Tensor:
    """Return the values of v(S) = mean gain of the rows of S inside, v of none = ``empty``.

    Of t rows inside, s_i = 1/t [g_i - empty + (H_t - 1) (g_i - mean gain of the other rows
    inside)]; rows outside have the value 0. Source: Wang et al. 2023 (arXiv
    2308.15709).

    Args:
        gains: Float64, ``[n, C]``.
        inside: Which rows count, ``[n, C]``.
        empty: Utility of no rows.
    """
    gains = gains * inside
    count = inside.sum(0)
    surplus = _harmonic(gains.T)[count] - 1
    others = (gains.sum(0) - gains) / (count - 1).clamp_min(1)
    values = (gains - empty + surplus * (gains - others)) / count.clamp_min(1)
    return torch.where(inside, values, 0)


def _ranks(gains: Tensor) -> Tensor:
    return torch.arange(1, gains.shape[1] + 1, device=gains.device, dtype=torch.float64)


def _harmonic(gains: Tensor) -> Tensor:
    """Return H_0 ... H_n."""
    return torch.nn.functional.pad((1 / _ranks(gains)).cumsum(0), (1, 0))


def _from_here(terms: Tensor) -> Tensor:
    """Return sum_(j >= i) of the terms in their place, added from the far end, the smallest first.

    NumPy reads backwards, so that nothing is turned on the CPU.
    """
    if terms.device.type != "cpu":
        return terms.flip(1).cumsum(1).flip(1)
    backwards = terms.numpy()[:, ::-1]
    np.add.accumulate(backwards, axis=1, out=backwards)
    return terms
