"""Shapley values by enumeration of all sets, and the utilities of the nearest-neighbour games."""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations

import numpy as np


def shapley(utility, count):
    """Return the Shapley values of ``utility(tuple of players)``, ``[n]``, over all 2^n sets."""
    utility = cache(utility)
    values = np.zeros(count)
    for size in range(count):
        weight = 1 / (count * math.comb(count - 1, size))
        for i in range(count):
            others = [k for k in range(count) if k != i]
            values[i] += weight * math.fsum(
                utility(tuple(sorted((*some, i)))) - utility(some)
                for some in combinations(others, size)
            )
    return values


def nearest(rows, distances, neighbours):
    """Return the K nearest of some rows; of equal distances the first row is the nearer one."""
    return sorted(rows, key=lambda k: (distances[k], k))[:neighbours]


def classification(distances, labels, label, neighbours, weights=None):
    weights = np.ones(len(labels)) if weights is None else weights

    def utility(rows):
        chosen = nearest(rows, distances, neighbours)
        return sum(weights[k] * (labels[k] == label) for k in chosen) / neighbours

    return utility


def regression(distances, labels, label, neighbours, weights=None):
    weights = np.ones(len(labels)) if weights is None else weights

    def utility(rows):
        chosen = nearest(rows, distances, neighbours)
        return -((sum(weights[k] * labels[k] for k in chosen) / neighbours - label) ** 2)

    return utility


def soft_label(distances, labels, label, neighbours):
    def utility(rows):
        chosen = nearest(rows, distances, neighbours)
        if not chosen:
            return 1 / len(set(labels))
        return sum(labels[k] == label for k in chosen) / len(chosen)

    return utility


def threshold(distances, labels, label, radius):
    def utility(rows):
        chosen = [k for k in rows if distances[k] <= radius]
        if not chosen:
            return 1 / len(set(labels))
        return sum(labels[k] == label for k in chosen) / len(chosen)

    return utility
