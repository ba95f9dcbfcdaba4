"""Samples without replacement that need no table of the population.

A permutation of [0, N) is a function of a key: a Feistel network on the two digits of a number in a
mixed radix, walked until it lands below N. The sample is where the first k numbers go. Source:
Black and Rogaway 2002, Ciphers with Arbitrary Finite Domains, the generalised Feistel cipher and
cycle walking.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dattri_parts.projectors.philox import LOW, philox

Numbers = NDArray[np.int64]

ROUNDS = 16
"""Of the network: so many that populations of a few numbers are sampled evenly too."""
AT_ONCE = 2**20
"""Numbers that are permuted at once; bounds the memory, never the sample."""


def sorted_sample(key: int, population: int, count: int) -> Tensor:
    """Return ``count`` different numbers of [0, ``population``) in ascending order, ``[count]``.

    Every number is as likely as any other to be in it, with probability count / population. The
    sample of a smaller count is a part of that of a larger one.

    Args:
        key: 64 bits.
        population: N, below 2^62.
        count: k, at most N.
    """
    if count == population:
        return torch.arange(population)
    parts = [
        permuted(key, population, np.arange(first, min(first + AT_ONCE, count), dtype=np.int64))
        for first in range(0, count, AT_ONCE)
    ]
    return torch.from_numpy(np.sort(np.concatenate(parts)))


def permuted(key: int, population: int, numbers: Numbers) -> Numbers:
    """Return where a permutation of [0, ``population``) takes some of its numbers."""
    radix = math.isqrt(population - 1) + 1
    other = -(-population // radix)  # radix * other is at least N, and below N + radix
    found = _network(key, radix, other, numbers)
    while len(outside := np.flatnonzero(found >= population)):
        found[outside] = _network(key, radix, other, found[outside])
    return found


def _network(key: int, radix: int, other: int, numbers: Numbers) -> Numbers:
    left, right = numbers // other, numbers % other
    for step in range(ROUNDS):
        if step % 2 == 0:
            left = (left + _moved(key, step, right, radix)) % radix
        else:
            right = (right + _moved(key, step, left, other)) % other
    moved: Numbers = left * other + right
    return moved


def _moved(key: int, step: int, digit: Numbers, below: int) -> Numbers:
    """Return a random number below a bound for each digit: 63 bits, so that the bias is nothing."""
    none = np.zeros_like(digit)
    low, high, *_ = philox((digit & LOW, digit >> 32, none + step, none), key)
    number: Numbers = ((high & (LOW >> 1)) << 32 | low) % below
    return number
