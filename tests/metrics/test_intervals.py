"""Formulas of intervals against scipy's, other derivations, and their own equations."""

import math

import numpy as np
import pytest
from dattri_metrics import (
    Bootstrap,
    auroc,
    average_precision,
    brittleness,
    class_detection,
    inspection_area,
    share_flipped,
    shortcut_detection,
    top_k_overlap,
)
from dattri_metrics.intervals import Correlation, Proportion
from dattri_metrics.mislabel import trials_of_pairs
from dattri_metrics.precision import precisions
from dattri_metrics.spread import Estimate, Spread, spread
from scipy import stats


def seen(variance, freedom):
    return Spread(variance, freedom, ())


# --- proportions ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("hits", "tests"), [(0, 20), (1, 20), (7, 20), (20, 20), (1, 1), (0, 1)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_a_share_of_tests_has_wilsons_interval(hits, tests, confidence):
    found = share_flipped(
        [1] * hits + [6] * (tests - hits),
        [6],
        largest=5,
        bootstrap=Bootstrap(confidence=confidence),
    )
    want = stats.binomtest(hits, tests).proportion_ci(confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((want.low, want.high), abs=1e-12)


def test_the_ends_solve_the_equation_with_a_moderated_variance():
    value, variance, freedom, trials = 0.8, 0.002, 6.0, 15
    low, high = Proportion(trials).ends(value, seen(variance, freedom), 0.9)
    binomial = value * (1 - value) / trials
    ratio = (4 * 1 + freedom * variance / binomial) / (4 + freedom)
    t = stats.t.ppf(0.95, 4 + freedom)
    for end, side in ((low, -1), (high, 1)):
        theta = value + side * abs(end - value)
        want = t * math.sqrt(ratio * theta * (1 - theta) / trials)
        assert abs(end - value) == pytest.approx(want)
    scaled = Proportion(trials, -2.0, 6.0).ends(-2 + 8 * value, seen(64 * variance, freedom), 0.9)
    assert scaled == pytest.approx((-2 + 8 * low, -2 + 8 * high))


def test_much_evidence_outweighs_the_prior_and_none_leaves_it():
    value, trials = 0.5, 10
    exact = Proportion(trials).ends(value, seen(0.0001, 1e9), 0.95)
    assert exact[1] - exact[0] == pytest.approx(2 * 1.96 * 0.01, rel=2e-3)
    unseen = Proportion(trials).ends(1.0, seen(0.0, 0.0), 0.95)
    t = stats.t.ppf(0.975, 4)
    assert unseen == pytest.approx((trials / (trials + t * t), 1.0))


def test_equal_fractions_are_narrower_than_coins_but_not_certain():
    wide = Proportion(12, most=True).ends(0.5, seen(0.25 / 11, 11.0), 0.95)
    narrow = Proportion(12, most=True).ends(0.5, seen(0.01 / 11, 11.0), 0.95)
    assert 0.05 < narrow[1] - narrow[0] < 0.7 * (wide[1] - wide[0])


def test_trials_of_pairs_are_hanley_and_mcneils_with_both_groups_exchanged():
    """Their formula (1982) with Q1 = A / (2 - A), Q2 = 2 A^2 / (1 + A), by mean over exchanges."""
    for area, p, q in ((0.5, 3, 27), (0.9, 10, 90), (0.99, 1, 9), (1.0, 4, 4)):

        def variance(p, q, a=area):
            q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
            return (a * (1 - a) + (p - 1) * (q1 - a * a) + (q - 1) * (q2 - a * a)) / (p * q)

        mean = (variance(p, q) + variance(q, p)) / 2
        assert mean == pytest.approx(area * (1 - area) / trials_of_pairs(area, p, q), abs=1e-15)


# --- variances ------------------------------------------------------------------------------------
def test_the_variance_of_an_auroc_is_delongs(monkeypatch):
    from dattri_metrics import mislabel

    kept = []
    monkeypatch.setattr(mislabel, "summary", lambda estimate, *a, **k: kept.append(estimate))
    random = np.random.default_rng(0)
    scores, wrong = np.round(random.normal(size=40), 1), np.arange(40) < 7
    auroc(scores, wrong)
    up, down = scores[wrong], scores[~wrong]
    wins = (up[:, None] > down) + 0.5 * (up[:, None] == down)
    want = wins.mean(1).var(ddof=1) / 7 + wins.mean(0).var(ddof=1) / 33
    assert spread(kept[0], float(wins.mean())).variance == pytest.approx(want)


def test_groups_of_random_size_add_the_variance_of_their_sizes():
    """A mean of group 0 and group 1: the pooled variance, but for degrees of freedom."""
    random = np.random.default_rng(1)
    groups = np.arange(4000) % 4 == 0
    moves = random.normal(size=4000) + 3 * groups
    moves -= moves.mean()
    found = spread(Estimate(np.zeros(1), moves[:, None], groups), 0.0)
    assert found.variance == pytest.approx(moves.var() / 4000, rel=2e-3)


def test_freedom_is_that_of_the_variance_of_numbers_with_exceptions():
    random = np.random.default_rng(2)
    for rate, k in ((0.5, 40), (0.1, 100), (0.03, 400)):
        draws = (random.random((4000, k)) < rate).astype(float)
        squares = draws.var(axis=1, ddof=1)
        want = 2 * squares.mean() ** 2 / squares.var()
        typical = np.arange(k) < round(rate * k)
        found = spread(Estimate(typical.astype(float), None), float(typical.mean())).freedom
        assert found == pytest.approx(min(want, k - 1), rel=0.1)


def test_a_group_of_one_says_nothing_of_its_variance():
    groups, moves = np.arange(9) < 1, np.arange(9.0) - 4
    assert spread(Estimate(np.zeros(1), moves[:, None], groups), 0.0).freedom == 0
    found = auroc(np.arange(20.0), np.arange(20) == 12)
    want = Proportion(trials_of_pairs(found.value, 1, 19)).ends(found.value, seen(0.0, 0.0), 0.95)
    assert (found.low, found.high) == pytest.approx(want)


# --- correlations ---------------------------------------------------------------------------------
def test_with_the_variance_of_a_normal_pair_it_is_fishers():
    x, y = np.random.default_rng(3).normal(size=(2, 17))
    y += x
    theirs = stats.pearsonr(x, y)
    value = theirs.statistic
    variance = (1 - value**2) ** 2 / (17 - 3)
    found = Correlation(17, ranks=False).ends(value, seen(variance, 1e12), 0.95)
    want = theirs.confidence_interval(0.95)
    assert found == pytest.approx((want.low, want.high), abs=1e-6)


@pytest.mark.parametrize("rows", [4, 10, 50])
@pytest.mark.parametrize("level", [-0.95, -0.3, 0.0, 0.6, 0.99])
def test_the_bias_of_rank_correlations_is_morans(rows, level):
    """E r = 6 / (pi (n + 1)) (asin rho + (n - 2) asin(rho / 2)) for a normal pair (Moran 1948)."""
    mean = 6 / math.pi / (rows + 1) * (math.asin(level) + (rows - 2) * math.asin(level / 2))
    truth = 6 / math.pi * math.asin(level / 2)
    ends = Correlation(rows, ranks=True).ends(mean, seen(1e-18, 1e9), 0.95)
    assert ends == pytest.approx((min(mean, truth), max(mean, truth)), abs=1e-6)
    plain = Correlation(rows, ranks=False).ends(mean, seen(1e-18, 1e9), 0.95)
    assert plain == pytest.approx((mean, mean), abs=1e-6)


@pytest.mark.parametrize("rows", [4, 8, 30])
def test_perfect_correlations_have_the_interval_of_one_exchange_of_neighbours(rows):
    exchanged = np.arange(rows)
    exchanged[:2] = 1, 0
    r = stats.spearmanr(np.arange(rows), exchanged).statistic
    z = math.sqrt((1 + r * r / 2) / (rows - 3)) * stats.t.ppf(0.975, rows - 1)
    want = math.tanh(math.atanh(r) - z)
    for kind in (True, False):
        shape = Correlation(rows, ranks=kind)
        assert shape.ends(1.0, seen(0.0, 0.0), 0.95)[0] == pytest.approx(want)
        assert shape.ends(-1.0, seen(0.0, 0.0), 0.95)[1] == pytest.approx(-want)
        assert shape.ends(0.0, seen(0.0, 0.0), 0.95) == (0.0, 0.0)
    assert Correlation(3, ranks=True).ends(1.0, seen(0.0, 0.0), 0.95) == (-1.0, 1.0)


def test_pearsons_of_three_rows_says_nothing():
    from dattri_metrics import loo_correlation

    x, y = np.random.default_rng(4).normal(size=(2, 3, 5))
    found = loo_correlation(x, y, higher_is_better=True)
    assert (found.low, found.high) == (-1, 1)


# --- no interval without a width ------------------------------------------------------------------
BEST = np.arange(12) < 3


@pytest.mark.parametrize(
    "found",
    [
        auroc(BEST * 1.0, BEST),
        auroc([0.0, 1.0], [False, True]),
        auroc(np.ones(12), BEST),
        average_precision(BEST * 1.0, BEST),
        inspection_area(BEST * 1.0, BEST),
        inspection_area(-1.0 * BEST, BEST),
        class_detection(BEST[:, None] * 1.0, BEST, [True]),
        class_detection(np.zeros((12, 4)), BEST, [True] * 4),
        top_k_overlap(BEST[:, None] * np.arange(1.0, 13)[:, None], np.arange(12.0)[:, None], k=2),
        shortcut_detection(BEST[:, None] * np.ones((1, 5)), BEST, np.ones(5)),
        brittleness([1], [3], largest=5),
        brittleness([2, 2, 2], [3], largest=5),
        share_flipped([6, 6], [3], largest=5),
    ],
)
def test_an_extreme_value_or_one_test_has_an_interval_with_a_width(found):
    assert found.low <= found.value <= found.high
    assert found.high - found.low > 0.15
    assert found.low >= 0


def test_precisions_carry_their_groups():
    scores = np.random.default_rng(5).normal(size=(12, 2))
    positive = np.broadcast_to(BEST[:, None], scores.shape)
    assert precisions(scores, positive).strata is None
    assert (precisions(scores, positive, BEST).strata == BEST).all()
