"""Every game equals its 2^n enumeration: K > n, ties, duplicates, weights, thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dattri_knn.classification import KNNShapley
from dattri_knn.regression import KNNShapleyRegression
from dattri_knn.soft_label import SoftLabelKNNShapley
from dattri_knn.threshold import ThresholdKNNShapley
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import knn_games as games

from dattri_core import DenseBlock, Side

WITHIN = 1e-12
# Coordinates on a grid of three: most draws have ties, and many have duplicates.
POINT = st.tuples(st.integers(-1, 1), st.integers(-1, 1))


@st.composite
def problems(draw, largest=10):
    count = draw(st.integers(1, largest))
    train = draw(st.lists(POINT, min_size=count, max_size=count))
    test = draw(st.lists(POINT, min_size=1, max_size=2))
    labels = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    answers = draw(st.lists(st.integers(0, 2), min_size=len(test), max_size=len(test)))
    return train, labels, test, answers, draw(st.integers(1, count + 2))


def score(scorer, train, labels, test, answers, cut=1):
    """Return the scores of a scorer, its rows given in ``cut`` blocks."""
    sides, rows = [], []
    for points, marks in ((train, labels), (test, answers)):
        values = torch.tensor(points, dtype=torch.float64)
        norm = values.norm(dim=1) if "norm" in scorer.needs else None
        sides.append(Side(torch.arange(len(values)), {"label": torch.tensor(marks)}, norm))
        rows.append(values)
    parts = [
        scorer.pair(DenseBlock(left), DenseBlock(right))
        for left, right in zip(*(values.chunk(cut, 1) for values in rows), strict=True)
    ]
    scored = scorer.finish(torch.stack(parts).sum(0), *sides)
    assert scored.weight is None
    return scored.values.numpy()


def distances(train, point, kind="l2"):
    apart = np.asarray(train, float) - np.asarray(point, float)
    if kind == "l1":
        return np.abs(apart).sum(1)
    return np.sqrt((apart**2).sum(1))


def agree(got, utility, count):
    want = games.shapley(utility, count)
    assert np.abs(got - want).max() <= WITHIN
    assert abs(got.sum() - (utility(tuple(range(count))) - utility(()))) <= WITHIN


@settings(max_examples=120, deadline=None)
@given(problems(), st.sampled_from(["l2", "l1"]))
def test_classification(problem, kind):
    train, labels, test, answers, k = problem
    got = score(KNNShapley(k, kind), train, labels, test, answers, cut=2)
    for j, point in enumerate(test):
        utility = games.classification(distances(train, point, kind), labels, answers[j], k)
        agree(got[:, j], utility, len(train))


@settings(max_examples=120, deadline=None)
@given(problems())
def test_regression(problem):
    train, labels, test, answers, k = problem
    values = [label * 1.75 - 0.5 for label in labels]
    asked = [answer - 1.25 for answer in answers]
    got = score(KNNShapleyRegression(k), train, values, test, asked)
    for j, point in enumerate(test):
        agree(got[:, j], games.regression(distances(train, point), values, asked[j], k), len(train))


def weights(kind, far, k, bandwidth):
    positive = far[far > 0]
    width = bandwidth or np.sort(far)[min(k, len(far)) - 1]
    width = width or (positive.min() if len(positive) else 1.0)
    return np.exp(-((far / width) ** 2) / 2) if kind == "gaussian" else 1 / (1 + far / width)


@settings(max_examples=80, deadline=None)
@given(problems(8), st.sampled_from(["gaussian", "inverse"]), st.sampled_from([None, 0.7]))
def test_weights(problem, kind, bandwidth):
    train, labels, test, answers, k = problem
    for part, game in (
        (KNNShapley, games.classification),
        (KNNShapleyRegression, games.regression),
    ):
        scorer = part(k, weights=kind, bandwidth=bandwidth)
        got = score(scorer, train, labels, test, answers)
        for j, point in enumerate(test):
            far = distances(train, point)
            weight = weights(kind, far, k, bandwidth)
            agree(got[:, j], game(far, labels, answers[j], k, weight), len(train))


@settings(max_examples=120, deadline=None)
@given(problems())
def test_soft_labels(problem):
    train, labels, test, answers, k = problem
    got = score(SoftLabelKNNShapley(k), train, labels, test, answers)
    for j, point in enumerate(test):
        agree(
            got[:, j], games.soft_label(distances(train, point), labels, answers[j], k), len(train)
        )


@settings(max_examples=120, deadline=None)
@given(problems(), st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0]))
def test_thresholds(problem, radius):
    train, labels, test, answers, _ = problem
    got = score(ThresholdKNNShapley(radius, "l2"), train, labels, test, answers)
    for j, point in enumerate(test):
        utility = games.threshold(distances(train, point), labels, answers[j], radius)
        agree(got[:, j], utility, len(train))


@pytest.mark.parametrize("kind", ["cosine", "dot"])
def test_distances_of_angles_and_products(kind):
    generator = np.random.default_rng(5)
    train, test = generator.normal(size=(9, 4)), generator.normal(size=(2, 4))
    train[3] = 0  # at a right angle to everything
    labels, answers = generator.integers(0, 3, 9).tolist(), [0, 2]
    got = score(KNNShapley(2, kind), train, labels, test, answers, cut=2)
    for j, point in enumerate(test):
        far = -train @ point
        if kind == "cosine":
            sizes = np.linalg.norm(train, axis=1) * np.linalg.norm(point)
            far = 1 + far / np.where(sizes > 0, sizes, 1)
        agree(got[:, j], games.classification(far, labels, answers[j], 2), 9)


@pytest.mark.parametrize("scorer", [KNNShapley(3), KNNShapleyRegression(3), SoftLabelKNNShapley(3)])
def test_ten_rows(scorer):
    generator = np.random.default_rng(7)
    train, test = generator.normal(size=(10, 3)), generator.normal(size=(1, 3))
    labels, answers = generator.integers(0, 2, 10).tolist(), [1]
    game = {KNNShapley: games.classification, KNNShapleyRegression: games.regression}
    made = game.get(type(scorer), games.soft_label)
    got = score(scorer, train, labels, test, answers)
    agree(got[:, 0], made(distances(train, test[0]), labels, 1, 3), 10)
