"""Samples without a table: permutations, even odds of every subset, a frozen sample."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from dattri_parts.projectors import sampling
from dattri_parts.projectors.sampling import permuted, sorted_sample

KEY = 0x1234_5678_9ABC_DEF0


@pytest.mark.parametrize("population", [1, 2, 3, 4, 5, 7, 12, 101, 1024, 9999])
def test_a_permutation_takes_every_number_somewhere_else(population):
    for key in (0, KEY, 2**63 - 1):
        assert sorted(permuted(key, population, np.arange(population))) == list(range(population))


@pytest.mark.parametrize("at_once", [1, 7, 2**20])
def test_a_sample_is_sorted_and_part_of_a_larger_one(monkeypatch, at_once):
    whole = sorted_sample(KEY, 50, 50)
    assert torch.equal(whole, torch.arange(50))
    monkeypatch.setattr(sampling, "AT_ONCE", at_once)
    samples = [set(sorted_sample(KEY, 50, count).tolist()) for count in range(1, 51)]
    assert [len(s) for s in samples] == list(range(1, 51))
    assert all(small < large for small, large in itertools.pairwise(samples))
    drawn = sorted_sample(KEY, 50, 20)
    assert torch.equal(drawn, drawn.sort().values)
    assert drawn.dtype == torch.int64


def samples_of(keys, population, count):
    """Return the sample of every key ``[keys, count]``: all keys at once, walked by masks."""
    radix = math.isqrt(population - 1) + 1
    other = -(-population // radix)
    numbers = np.broadcast_to(np.arange(count), (len(keys), count))
    found = sampling._network(keys[:, None], radix, other, numbers)
    while (found >= population).any():
        again = sampling._network(keys[:, None], radix, other, found)
        found = np.where(found >= population, again, found)
    return np.sort(found, axis=1)


@pytest.mark.parametrize(("population", "count"), [(3, 1), (4, 2), (5, 2), (6, 3), (7, 3)])
def test_every_subset_is_as_likely_as_any_other(population, count):
    """Chi squared of the counts of all subsets, within 4 of its standard deviations."""
    keys = np.random.default_rng(3).integers(2**62, size=40_000)
    drawn = samples_of(keys, population, count)
    for at in (0, 1, 77):
        alone = sorted_sample(int(keys[at]), population, count)
        assert alone.tolist() == drawn[at].tolist()
    counted = Counter(map(tuple, drawn.tolist()))
    subsets = list(itertools.combinations(range(population), count))
    assert set(counted) <= set(subsets)
    expected = len(keys) / len(subsets)
    statistic = sum((counted[s] - expected) ** 2 / expected for s in subsets)
    freedom = len(subsets) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("population", [2**31 + 11, 2**33, 2**40])
def test_large_populations_are_covered_evenly(population):
    drawn = sorted_sample(KEY, population, 4096)
    assert len(torch.unique(drawn)) == 4096
    assert 0 <= int(drawn[0]) <= int(drawn[-1]) < population
    share = drawn.double() / population
    assert abs(float(share.mean()) - 0.5) < 5 / math.sqrt(12 * 4096)
    counted = torch.bincount((share * 64).long(), minlength=64).double()
    assert abs(float((counted - 64).square().sum() / 64) - 63) < 5 * math.sqrt(2 * 63)
    odd = float((drawn % 2).double().mean())
    assert abs(odd - 0.5) < 5 / math.sqrt(4 * 4096)


def test_other_keys_give_unrelated_samples():
    first, second = (sorted_sample(key, 10**6, 10**4) for key in (KEY, KEY + 1))
    shared = len(set(first.tolist()) & set(second.tolist()))
    assert abs(shared - 100) < 5 * math.sqrt(100)


def test_samples_are_frozen():
    assert sorted_sample(KEY, 1000, 8).tolist() == [198, 265, 438, 669, 737, 760, 814, 853]
    assert sorted_sample(KEY, 2**33, 4).tolist() == [41196900, 1482889539, 1543722211, 2194243226]
