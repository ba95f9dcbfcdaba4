"""Intervals hold what they should as often as they say, whatever varies."""

import numpy as np
import pytest
from dattri_metrics.bootstrap import FEW, GROUPS, Bootstrap, summary
from dattri_metrics.spread import Estimate
from scipy import stats

from dattri_core import InputError


def crossed(random, rows, tests, of_rows, of_tests, of_both):
    """A table with mean 0: row effects, test effects and the rest."""
    return (
        of_rows * random.normal(size=(rows, 1))
        + of_tests * random.normal(size=(1, tests))
        + of_both * random.normal(size=(rows, tests))
    )


def of_table(table):
    values = table.mean(axis=0)
    return Estimate(values, table - values)


@pytest.mark.parametrize(
    ("rows", "tests", "sizes"),
    [
        (50, 40, (1, 1, 1)),
        (50, 40, (0, 0, 1)),  # counting what both share twice or three times would be too wide
        (50, 40, (1, 0, 0.1)),
        (12, 40, (1, 0.1, 0.1)),  # few rows: normal quantiles would be too narrow
        (40, 8, (0, 1, 1)),
    ],
)
def test_two_crossed_samples_are_covered(rows, tests, sizes):
    covered = 0
    for seed in range(400):
        table = crossed(np.random.default_rng(seed), rows, tests, *sizes)
        found = summary(of_table(table), 0.0, Bootstrap(resamples=400, seed=seed))
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / 400 <= 0.975


def test_one_sample_is_covered_with_either_side_alone():
    covered = np.zeros(2)
    for seed in range(400):
        drawn = np.random.default_rng(seed).normal(size=20)
        for side, estimate in enumerate(
            (
                Estimate(drawn, None),
                Estimate(np.array([drawn.mean()]), (drawn - drawn.mean())[:, None]),
            )
        ):
            found = summary(estimate, 0.0, Bootstrap(resamples=400, seed=seed))
            covered[side] += found.low <= 0 <= found.high
    assert (covered / 400 >= 0.92).all()
    assert (covered / 400 <= 0.975).all()


def test_more_confidence_is_wider():
    table = crossed(np.random.default_rng(0), 30, 20, 1, 1, 1)
    widths = []
    for confidence in (0.5, 0.8, 0.95, 0.99):
        found = summary(of_table(table), 0.0, Bootstrap(5000, confidence))
        assert found.low <= found.value <= found.high
        assert found.confidence == confidence
        widths.append(found.high - found.low)
    assert widths == sorted(widths)
    assert widths[0] < widths[1] < widths[2] < widths[3]


def test_many_rows_are_drawn_in_groups_of_the_same_spread():
    random = np.random.default_rng(0)
    moves = random.exponential(size=20 * GROUPS)
    moves -= moves.mean()
    found = summary(Estimate(np.array([0.0]), moves[:, None]), 0.0, Bootstrap(4000))
    want = 1.96 * moves.std() / np.sqrt(len(moves))
    assert (-found.low, found.high) == pytest.approx((want, want), rel=0.06)


def test_skewness_is_kept():
    random = np.random.default_rng(1)
    found = summary(Estimate(random.exponential(size=25) ** 2, None), 0.0, Bootstrap(20000))
    assert found.high - found.value > 1.15 * (found.value - found.low)


def test_of_few_values_it_is_students():
    """Drawn again, a few numbers take a few means."""
    for count in (2, 5, FEW - 1):
        drawn = np.random.default_rng(count).normal(size=count)
        found = summary(Estimate(drawn, None), 0.0, Bootstrap(confidence=0.9))
        want = stats.t.interval(0.9, count - 1, drawn.mean(), stats.sem(drawn))
        assert (found.low, found.high) == pytest.approx(want)


def test_without_spread_and_at_the_bounds():
    same = Estimate(np.ones(4), np.zeros((9, 4)))
    found = summary(same, 0.0, Bootstrap())
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)
    alone = summary(Estimate(np.array([0.3]), None), 0.0, Bootstrap())
    assert (alone.low, alone.high) == (0.3, 0.3)
    near = summary(Estimate(np.array([0.9, 1.0, 1.0, 0.2]), None), 0.0, Bootstrap(), bounds=(0, 1))
    assert near.high == 1.0
    assert near.low >= 0


def test_order_does_not_matter_and_the_seed_does():
    table = crossed(np.random.default_rng(0), 30, 20, 1, 1, 1)
    want = summary(of_table(table), 0.0, Bootstrap())
    random = np.random.default_rng(1)
    mixed = table[random.permutation(30)][:, random.permutation(20)]
    found = summary(of_table(mixed), 0.0, Bootstrap())
    assert (found.value, found.low, found.high) == pytest.approx((want.value, want.low, want.high))
    assert summary(of_table(table), 0.0, Bootstrap()) == want
    assert summary(of_table(table), 0.0, Bootstrap(seed=1)).low != want.low


@pytest.mark.parametrize(
    "values", [{"resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}, {"seed": -1}]
)
def test_bad_settings(values):
    with pytest.raises(InputError, match="at least one resample"):
        Bootstrap(**values)
