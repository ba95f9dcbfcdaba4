"""Mislabel detection against scikit-learn, counting of pairs, and the drawn curve."""

import numpy as np
import pytest
from dattri_metrics import Bootstrap, auroc, average_precision, inspection_area
from dattri_metrics.mislabel import (
    MislabelAuroc,
    MislabelAveragePrecision,
    MislabelInspectionArea,
)
from dattri_metrics.precision import precisions
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy_world import Additive, effects, evidence_of

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


@settings(max_examples=60, deadline=None)
@given(cases())
def test_equals_every_pair_and_scikit_learn(case):
    from sklearn.metrics import roc_auc_score

    scores, wrong = case
    result = auroc(scores, wrong, bootstrap=Bootstrap(20))
    assert result.value == pytest.approx(by_pairs(scores, wrong), abs=1e-12)
    assert result.value == pytest.approx(roc_auc_score(wrong, scores), abs=1e-12)
    assert 0 <= result.low <= result.high <= 1


@settings(max_examples=30, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_reversal_and_order(case, random):
    scores, wrong = case
    forward = auroc(scores, wrong, bootstrap=Bootstrap(30))
    assert auroc(-scores, wrong, bootstrap=Bootstrap(30)).value == pytest.approx(1 - forward.value)
    order = list(range(len(scores)))
    random.shuffle(order)
    assert auroc(scores[order], wrong[order], bootstrap=Bootstrap(30)) == forward


def test_the_direction():
    assert auroc([3.0, 1.0, 2.0], [True, False, False]).value == 1.0
    assert auroc([0.0, 1.0, 2.0], [True, False, False]).value == 0.0
    assert auroc([1.0, 1.0, 1.0], [True, False, False]).value == 0.5
    assert auroc([1.0, 0.0], [1, 0]).chance == 0.5


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Two unit normals one apart: AUROC = Phi(1 / sqrt 2) = 0.760; 95 % intervals, 200 times."""
    covered = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        wrong = np.arange(400) < 80
        result = auroc(rng.normal(size=400) + wrong, wrong, bootstrap=Bootstrap(300, seed=seed))
        covered += result.low <= 0.7602499 <= result.high
    assert 0.90 <= covered / 150 <= 0.985


def test_intervals_have_a_formula_and_no_seed():
    rng = np.random.default_rng(0)
    scores, wrong = rng.normal(size=100), rng.random(100) < 0.2
    assert auroc(scores, wrong, bootstrap=Bootstrap(20, seed=1)) == auroc(scores, wrong)


@pytest.mark.parametrize(
    ("scores", "wrong", "message"),
    [
        ([1.0, 2.0], [True], "shape"),
        ([[1.0]], [[True]], "shape"),
        ([1.0, float("nan")], [True, False], r"suspicion\[1\] is nan"),
        ([1.0, 2.0], [True, True], "2 of 2"),
        ([1.0, 2.0], [False, False], "0 of 2"),
        ([1.0, 2.0], [2, 0], "other values"),
    ],
)
@pytest.mark.parametrize("function", [auroc, average_precision, inspection_area])
def test_bad_input(scores, wrong, message, function):
    with pytest.raises(InputError, match=message):
        function(scores, wrong)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_average_precision_equals_scikit_learn(case):
    from sklearn.metrics import average_precision_score

    scores, wrong = case
    result = average_precision(scores, wrong, bootstrap=Bootstrap(20))
    assert result.value == pytest.approx(average_precision_score(wrong, scores), abs=1e-12)


def test_average_precision_of_random_suspicion_is_its_chance():
    wrong, draws = np.arange(30) < 4, 4000
    suspicion = np.random.default_rng(0).random((30, draws))
    found = precisions(suspicion, np.broadcast_to(wrong[:, None], suspicion.shape)).values
    error = found.std() / draws**0.5
    chance = average_precision(suspicion[:, 0], wrong).chance
    assert abs(found.mean() - chance) < 4 * error
    assert chance > 4 / 30 + 5 * error


@settings(max_examples=40, deadline=None)
@given(cases())
def test_inspection_area_is_that_under_the_drawn_curve(case):
    """Ties looked at in one straight line; and the closed form by AUROC."""
    scores, wrong = case
    levels = np.unique(scores)[::-1]
    looked = np.array([0, *((scores >= t).mean() for t in levels)])
    found = np.array([0, *(wrong[scores >= t].sum() / wrong.sum() for t in levels)])
    area = (np.diff(looked) * (found[1:] + found[:-1]) / 2).sum()
    result = inspection_area(scores, wrong, bootstrap=Bootstrap(20))
    assert result.value == pytest.approx(area, abs=1e-12)
    pi = wrong.mean()
    ranking = auroc(scores, wrong, bootstrap=Bootstrap(20)).value
    assert result.value == pytest.approx((1 - pi) * ranking + pi / 2, abs=1e-12)
    assert result.ceiling == pytest.approx(1 - pi / 2)
    best = inspection_area(wrong.astype(float), wrong, bootstrap=Bootstrap(20))
    assert best.value == pytest.approx(best.ceiling)


@pytest.mark.parametrize("function", [average_precision, inspection_area])
def test_other_intervals_cover_what_large_samples_give(function):
    random = np.random.default_rng(0)
    wrong = random.random(400_000) < 0.2
    truth = function(random.normal(size=len(wrong)) + wrong, wrong).value
    covered = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        wrong = rng.random(400) < 0.2
        result = function(rng.normal(size=400) + wrong, wrong, bootstrap=Bootstrap(300, seed=seed))
        covered += result.low <= truth <= result.high
    assert 0.90 <= covered / 150 <= 0.985


def weighted(name, scores, wrong, w):
    """Each number as a function of the weights of examples."""
    h = (scores[:, None] > scores) + 0.5 * (scores[:, None] == scores)  # [i, k]: i above k
    up, down = w * wrong, w * ~wrong
    if name == "auroc":
        return up @ h @ down / (up.sum() * down.sum())
    return up @ h @ w / (up.sum() * w.sum())


@pytest.mark.parametrize("name", ["auroc", "inspection_area"])
def test_influence_is_the_derivative_by_weight(name, monkeypatch):
    from dattri_metrics import mislabel

    seen = []
    monkeypatch.setattr(mislabel, "summary", lambda estimate, *a, **k: seen.append(estimate))
    random = np.random.default_rng(3)
    scores, wrong = np.round(random.normal(size=12), 1), np.arange(12) % 3 == 0
    getattr(mislabel, name)(scores, wrong)
    want = []
    for s in range(12):
        values = []
        for t in (1e-6, -1e-6):
            w = np.full(12, (1 - t) / 12)
            w[s] += t
            values.append(weighted(name, scores, wrong, w))
        want.append((values[0] - values[1]) / 2e-6)
    # the AUROC lists them by group and by value; its sum does not care
    found = seen[0].influence[:, 0]
    assert np.sort(found) == pytest.approx(np.sort(want), abs=1e-6)


# --- parts ----------------------------------------------------------------------------------------
PARTS = [
    (MislabelAuroc, auroc),
    (MislabelAveragePrecision, average_precision),
    (MislabelInspectionArea, inspection_area),
]


@pytest.mark.parametrize(("part", "function"), PARTS)
def test_a_part_takes_self_influence_or_minus_the_mean_score(part, function):
    scores, own = effects(), np.random.default_rng(5).random(24)
    evidence = evidence_of(scores, Additive(scores), self_influence=own)
    wrong = evidence.world.flipped
    by_self, by_scores = function(own, wrong), function(-scores.mean(1), wrong)
    assert by_self.value != by_scores.value
    assert part().measure(evidence) == by_self
    assert part(by="self-influence").measure(evidence) == by_self
    assert part(by="scores").measure(evidence) == by_scores
    assert part().of(own, wrong) == by_self
    without = evidence_of(scores, Additive(scores))
    assert part().measure(without) == by_scores
    with pytest.raises(InputError, match="take by='scores'"):
        part(by="self-influence").measure(without)
    assert part().needs == {"mislabelled"}
    assert part(by="self-influence").needs == {"mislabelled", "self-influence"}


@pytest.mark.parametrize(("part", "function"), PARTS)
def test_self_influence_that_differs_by_rounding_only_is_a_tie(part, function):
    own = 1 + 1e-7 * np.random.default_rng(0).normal(size=24)
    scores = effects()
    evidence = evidence_of(scores, Additive(scores), self_influence=own)
    wrong = evidence.world.flipped
    tied = function(np.ones(24), wrong).value
    assert part(by="self-influence").measure(evidence).value == tied
    by_scores = function(-scores.mean(1), wrong).value
    assert part().measure(evidence).value == by_scores != tied
