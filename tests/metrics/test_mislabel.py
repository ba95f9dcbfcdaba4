"""AUROC against scikit-learn and against counting every pair."""

import numpy as np
import pytest
from dattri_metrics.mislabel import auroc
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dattri_core.errors import InputError


def by_pairs(scores, wrong):
    won = 0.0
    for s in scores[wrong]:
        for t in scores[~wrong]:
            won += 1.0 if s > t else 0.5 if s == t else 0.0
    return won / (wrong.sum() * (~wrong).sum())


@st.composite
def cases(draw):
    n = draw(st.integers(2, 25))
    few = st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0])
    scores = np.array(draw(st.lists(st.one_of(few, st.floats(-5, 5)), min_size=n, max_size=n)))
    wrong = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    assume(wrong.any() and not wrong.all())
    return scores, wrong


@settings(max_examples=120, deadline=None)
@given(cases())
def test_equals_every_pair_and_scikit_learn(case):
    from sklearn.metrics import roc_auc_score

    scores, wrong = case
    result = auroc(scores, wrong, resamples=20)
    assert result.value == pytest.approx(by_pairs(scores, wrong), abs=1e-12)
    assert result.value == pytest.approx(roc_auc_score(wrong, scores), abs=1e-12)
    assert 0 <= result.low <= result.high <= 1


@settings(max_examples=60, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_reversal_and_order(case, random):
    scores, wrong = case
    forward = auroc(scores, wrong, resamples=30)
    assert auroc(-scores, wrong, resamples=30).value == pytest.approx(1 - forward.value)
    order = list(range(len(scores)))
    random.shuffle(order)
    assert auroc(scores[order], wrong[order], resamples=30) == forward


def test_the_direction():
    assert auroc([3.0, 1.0, 2.0], [True, False, False]).value == 1.0
    assert auroc([0.0, 1.0, 2.0], [True, False, False]).value == 0.0
    assert auroc([1.0, 1.0, 1.0], [True, False, False]).value == 0.5
    assert auroc([1.0, 0.0], [1, 0]).chance == 0.5


def test_the_bootstrap_equals_resampling_one_by_one():
    """Each draw's statistic, recomputed by counting pairs of the very examples that were drawn."""
    from dattri_metrics import mislabel

    rng = np.random.default_rng(5)
    wrong = np.arange(40) < 7
    scores = np.round(rng.normal(size=40) + wrong, 1)  # with ties
    correct, bad = np.sort(scores[~wrong]), np.sort(scores[wrong])
    below, upto = (np.searchsorted(correct, bad, side) for side in ("left", "right"))
    draws = mislabel._resampled(below, upto, 33, 50, np.random.default_rng(9)) / (7 * 33)
    again = np.random.default_rng(9)
    drawn_correct = again.integers(0, 33, (50, 33))
    drawn_bad = again.integers(0, 7, (50, 7))
    for r in range(50):
        picked = np.concatenate([bad[drawn_bad[r]], correct[drawn_correct[r]]])
        assert draws[r] == pytest.approx(by_pairs(picked, np.arange(40) < 7), abs=1e-12)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Two unit normals one apart: AUROC = Phi(1 / sqrt 2) = 0.760; 95 % intervals, 200 times."""
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        wrong = np.arange(400) < 80
        result = auroc(rng.normal(size=400) + wrong, wrong, resamples=300, seed=seed)
        covered += result.low <= 0.7602499 <= result.high
    assert 0.90 <= covered / 200 <= 0.985


def test_memory_bounds_do_not_change_the_value(monkeypatch):
    from dattri_metrics import mislabel

    rng = np.random.default_rng(0)
    scores, wrong = rng.normal(size=100), rng.random(100) < 0.2
    want = auroc(scores, wrong).value
    monkeypatch.setattr(mislabel, "WORK", 1000)
    assert auroc(scores, wrong).value == want


def test_a_seed_gives_the_same_interval_and_another_a_different_one():
    rng = np.random.default_rng(0)
    scores, wrong = rng.normal(size=100), rng.random(100) < 0.2
    assert auroc(scores, wrong) == auroc(scores, wrong)
    assert auroc(scores, wrong, seed=1).low != auroc(scores, wrong).low


@pytest.mark.parametrize(
    ("scores", "wrong", "message"),
    [
        ([1.0, 2.0], [True], "shape"),
        ([[1.0]], [[True]], "shape"),
        ([1.0, float("nan")], [True, False], "example 1 is nan"),
        ([1.0, 2.0], [True, True], "2 of 2"),
        ([1.0, 2.0], [False, False], "0 of 2"),
        ([1.0, 2.0], [2, 0], "other values"),
    ],
)
def test_bad_input(scores, wrong, message):
    with pytest.raises(InputError, match=message):
        auroc(scores, wrong)
