"""Brittleness against trying every number of removals."""

import math

import numpy as np
import pytest
from dattri_metrics import Bootstrap, brittleness, share_flipped, smallest_removals
from dattri_metrics.flips import Brittleness, BrittlenessShare
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_world import Additive, effects, evidence_of

from dattri_core import InputError


def one_by_one(scores, flips, largest):
    found = []
    for j in range(scores.shape[1]):
        order = sorted(range(len(scores)), key=lambda i: -scores[i, j])
        for k in range(1, largest + 1):
            mask = np.ones(len(scores), dtype=bool)
            mask[order[:k]] = False
            if flips(mask[None], np.array([j]))[0]:
                break
        else:
            k = largest + 1
        found.append(k)
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.data())
def test_bisection_finds_what_trying_each_finds(seed, n, data):
    largest = data.draw(st.integers(1, n - 1))
    random = np.random.default_rng(seed)
    truth = random.exponential(size=(n, 4))  # removing more never helps
    scores = np.round(random.normal(size=(n, 4)), 1)
    thresholds = random.uniform(0, truth.sum(0))
    rounds = []

    def flips(masks, tests):
        rounds.append(len(tests))
        return (masks * truth[:, tests].T).sum(1) < thresholds[tests]

    found = smallest_removals(scores, flips, largest)
    assert found.tolist() == one_by_one(scores, flips, largest)
    rounds.clear()
    smallest_removals(scores, flips, largest)
    assert len(rounds) <= 1 + np.ceil(np.log2(largest + 1))


def test_the_median_and_the_share():
    smallest, control = [1, 3, 3, 8, 11], [9, 11, 11]
    found = brittleness(smallest, control, largest=10)
    assert (found.value, found.chance, found.higher_is_better) == (3, 11, False)
    assert (found.low, found.high) == (1, 11)  # five tests say nothing at 95 %
    share = share_flipped(smallest, control, largest=10)
    assert (share.value, share.chance, share.higher_is_better) == (4 / 5, 1 / 3, True)
    assert share.low < 4 / 5 < share.high <= 1


@pytest.mark.parametrize("tests", [5, 6, 8, 9, 12, 30, 61])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_of_the_median_is_the_narrowest_by_counts(tests, confidence):
    """Sums of binomial probabilities: 1 - 2 P(fewer than l below the median)."""
    found = brittleness(
        np.arange(1, tests + 1), [1], largest=99, bootstrap=Bootstrap(confidence=confidence)
    )

    def held(place):  # by the place-th smallest and largest
        return 1 - 2 * sum(math.comb(tests, k) for k in range(place)) / 2**tests

    place = int(found.low) if found.high < 100 else 0
    assert held(place) >= confidence > held(place + 1)
    assert found.high == (tests + 1 - place if place else 100)
    assert found.low == max(place, 1)


def test_the_interval_of_the_median_covers():
    covered = 0
    for seed in range(200):
        drawn = np.random.default_rng(seed).integers(1, 400, size=61)
        found = brittleness(drawn, drawn, largest=500, bootstrap=Bootstrap(300, seed=seed))
        covered += found.low <= 200 <= found.high
    assert 0.90 <= covered / 200 <= 0.985


def test_the_part_finds_the_smallest_removal_of_additive_models():
    """Outcomes are right while the sum of effects is above a threshold: greedy is optimal."""
    truth = np.random.default_rng(0).exponential(size=(40, 12))
    retraining = Additive(truth, threshold=25.0)
    evidence = evidence_of(truth, retraining)
    found, control, largest = Brittleness(tests=100, largest=0.9).search(evidence)
    right = np.flatnonzero(truth.sum(0) > 25)
    want = [
        next(k for k in range(1, 41) if np.sort(truth[:, j])[: 40 - k].sum() <= 25) for j in right
    ]
    assert found.tolist() == want
    assert largest == 36
    assert (control >= found).all()
    result = Brittleness(tests=100, largest=0.9).measure(evidence)
    assert result.value == np.median(want)
    assert result.value < result.chance
    share = BrittlenessShare(tests=100, largest=0.3).measure(evidence)
    assert share.value == np.mean(np.array(want) <= 12)
    assert share.value > share.chance
    some, _, _ = Brittleness(tests=3, largest=0.9).search(evidence)
    assert len(some) == 3


def test_repeats_are_other_seeds_and_equal_masks_are_asked_once():
    rounds = []

    class Watched(Additive):
        def outcomes(self, counterfactuals, target):
            rounds.append([c.key for c in counterfactuals])
            return super().outcomes(counterfactuals, target)

    truth = np.random.default_rng(0).exponential(size=(40, 12))
    retraining = Watched(truth, threshold=25.0, noise=0.1)
    Brittleness(tests=100, largest=0.5, repeats=3).search(evidence_of(truth, retraining))
    assert retraining.asked[0].mask.all()
    assert len({c.seed for c in retraining.asked}) == 3
    assert all(len(keys) == len(set(keys)) for keys in rounds)
    # in random order all tests share one order: their first removal is one mask
    assert sorted({len(keys) for keys in rounds})[0] == 3
    assert sum(len(keys) == 3 for keys in rounds) >= 2


def test_half_of_the_repeats_right_counts_as_right():
    class Half(Additive):
        def outcomes(self, counterfactuals, target):
            seeds = sorted({c.seed for c in counterfactuals})
            rows = [float(c.seed == seeds[0]) for c in counterfactuals]
            return np.repeat(np.array(rows)[:, None], self.n_test, axis=1)

    found, _, largest = Brittleness(repeats=2).search(evidence_of(effects(), Half(effects())))
    assert (found == largest + 1).all()


def test_bad_input_is_named():
    def flips(masks, tests):
        return np.zeros(len(tests), dtype=bool)

    with pytest.raises(InputError, match="largest is 5 of 5"):
        smallest_removals(np.eye(5), flips, 5)
    with pytest.raises(InputError, match=r"flips gave \(1,\) for 5 tests"):
        smallest_removals(np.eye(5), lambda masks, tests: [True], 2)
    with pytest.raises(InputError, match="holds 0 to 3 removals"):
        brittleness([0, 3], [1], largest=5)
    with pytest.raises(InputError, match="control holds 7 to 7"):
        share_flipped([1, 3], [7], largest=5)
    nothing_right = Additive(effects(), threshold=1e9)
    with pytest.raises(InputError, match="gets no test example right"):
        Brittleness().measure(evidence_of(effects(), nothing_right))
    retraining = Additive(effects())
    with pytest.raises(InputError, match="largest share between 0 and 1"):
        Brittleness(largest=1.0).measure(evidence_of(effects(), retraining))
    assert not retraining.asked
