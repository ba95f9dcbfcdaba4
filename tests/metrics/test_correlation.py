"""Correlations against scipy, and their influence functions against derivatives."""

import numpy as np
import pytest
from dattri_metrics import correlation as module
from dattri_metrics.correlation import correlate
from dattri_metrics.precision import expected_precision, precisions
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dattri_core import InputError


@st.composite
def pairs(draw, rows=(3, 14)):
    n, m = draw(st.integers(*rows)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    digits = draw(st.sampled_from([0, 1, 8]))  # 0: many ties
    x, y = (np.round(random.normal(size=(n, m)), digits) for _ in range(2))
    x[0], x[1], y[0], y[1] = -3, 3, 3, -3  # every column varies
    return x, y


@settings(max_examples=40, deadline=None)
@given(pairs(), st.sampled_from(["pearson", "spearman"]))
def test_equals_scipy(pair, kind):
    x, y = pair
    found = correlate("m", kind, x, y).values
    theirs = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[kind]
    want = [theirs(x[:, j], y[:, j]).statistic for j in range(x.shape[1])]
    assert found == pytest.approx(want, abs=1e-12)


def weighted(kind, x, y, w):
    """The correlation of one column as a function of the weights of rows."""
    if kind == "spearman":
        x, y = (((v[:, None] > v) + 0.5 * (v[:, None] == v)) @ w for v in (x, y))
    x, y = x - w @ x, y - w @ y
    return w @ (x * y) / np.sqrt((w @ (x * x)) * (w @ (y * y)))


def derivative(function, n, s, step=1e-6):
    """Of a function of weights, towards all weight on row s."""
    ends = []
    for t in (step, -step):
        w = np.full(n, (1 - t) / n)
        w[s] += t
        ends.append(function(w))
    return (ends[0] - ends[1]) / (2 * step)


@settings(max_examples=20, deadline=None)
@given(pairs(rows=(4, 9)), st.sampled_from(["pearson", "spearman"]))
def test_influence_is_the_derivative_by_weight(pair, kind):
    x, y = pair
    found = correlate("m", kind, x, y).influence
    n, m = x.shape
    want = [
        [derivative(lambda w, j=j: weighted(kind, x[:, j], y[:, j], w), n, s) for j in range(m)]
        for s in range(n)
    ]
    assert found == pytest.approx(np.array(want), abs=1e-5)
    assert found.mean(axis=0) == pytest.approx(np.zeros(m), abs=1e-12)


def test_blocks_of_columns_do_not_change_anything(monkeypatch):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 9, 7))
    want = correlate("m", "spearman", x, y)
    monkeypatch.setattr(module, "WORK", 20)
    found = correlate("m", "spearman", x, y)
    assert (found.values == want.values).all()
    assert (found.influence == want.influence).all()


def test_without_variation():
    """No truth: left out. No prediction: 0, and it stays in the mean."""
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 9, 3))
    want = correlate("m", "spearman", x, y).values
    constant = y.copy()
    constant[:, 0] = 0.3
    assert correlate("m", "spearman", x, constant).values == pytest.approx(want[1:])
    silent = x.copy()
    silent[:, 1] = 1e9 * (1 + 1e-15 * random.normal(size=9))  # varies by rounding only
    found = correlate("m", "spearman", silent, y)
    assert found.values == pytest.approx([want[0], 0, want[2]])
    assert not found.influence[:, 1].any()
    with pytest.raises(InputError, match="no outcome varies over the 9 rows of any of 3 tests"):
        correlate("m", "spearman", x, np.ones((9, 3)))
    with pytest.raises(InputError, match="over 2 rows"):
        correlate("m", "spearman", x[:2], y[:2])


def test_tiny_numbers_do_not_vanish():
    x, y = np.random.default_rng(0).normal(size=(2, 9, 1))
    want = correlate("m", "pearson", x, y).values
    assert correlate("m", "pearson", x * 1e-200, y * 1e200).values == pytest.approx(want)


# --- average precision of columns -----------------------------------------------------------------
@st.composite
def rankings(draw):
    n, m = draw(st.integers(2, 14)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    scores = np.round(random.normal(size=(n, m)), draw(st.sampled_from([0, 1, 8])))
    positive = random.random((n, m)) < draw(st.sampled_from([0.2, 0.6]))
    positive[0], positive[1] = True, False
    return scores, positive


@settings(max_examples=40, deadline=None)
@given(rankings())
def test_average_precision_equals_scikit_learn(case):
    from sklearn.metrics import average_precision_score

    scores, positive = case
    want = [average_precision_score(positive[:, j], scores[:, j]) for j in range(scores.shape[1])]
    assert precisions(scores, positive).values == pytest.approx(want, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(rankings())
def test_influence_of_average_precision_is_the_derivative(case):
    scores, positive = case

    def at(w, j):
        above = scores[:, j] >= scores[:, j][:, None]  # [i, k]: k at or above i
        precision = above @ (w * positive[:, j]) / (above @ w)
        return (w * positive[:, j]) @ precision / (w @ positive[:, j])

    n, m = scores.shape
    want = [[derivative(lambda w, j=j: at(w, j), n, s) for j in range(m)] for s in range(n)]
    assert precisions(scores, positive).influence == pytest.approx(np.array(want), abs=1e-5)


@pytest.mark.parametrize(("n", "p"), [(2, 1), (5, 1), (5, 3), (6, 5), (7, 7)])
def test_expected_precision_is_the_mean_over_all_orders(n, p):
    from itertools import combinations

    means = [
        np.mean([(t + 1) / place for t, place in enumerate(places)])
        for places in combinations(range(1, n + 1), p)
    ]
    assert expected_precision(n, p) == pytest.approx(np.mean(means), abs=1e-12)
