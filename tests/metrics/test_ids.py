"""Scores with ids meet the other arguments by them, or are refused."""

import numpy as np
import pytest
from dattri_metrics import (
    class_detection,
    lds,
    loo_correlation,
    mixed_source_detection,
    model_randomisation,
    rank_stability,
    shortcut_detection,
    smallest_removals,
    top_k_overlap,
)
from dattri_metrics.classes import ClassDetection
from dattri_metrics.evidence import scores_of
from toy_world import Additive, effects, evidence_of

from dattri_core import InputError, Scores

N, M = 16, 5
RANDOM = np.random.default_rng(0)
VALUES = effects(N, M)
MASKS = np.stack([RANDOM.permutation(N) < N // 2 for _ in range(20)])
OUTCOMES = MASKS @ VALUES + RANDOM.normal(size=(20, M))
LABELS, ASKED = np.arange(N) % 3, np.arange(M) % 3
NAMES = [f"a{i}" for i in range(N)], [f"b{j}" for j in range(M)]
MOVED = [int(i) for i in RANDOM.permutation(N)]

WITH_IDS = {
    "lds": lambda s, **ids: lds(s, MASKS, OUTCOMES, higher_is_better=True, **ids),
    "loo": lambda s, **ids: loo_correlation(s, VALUES + 1, higher_is_better=False, **ids),
    "class": lambda s, **ids: class_detection(s, LABELS, ASKED, **ids),
    "shortcut": lambda s, **ids: shortcut_detection(s, LABELS == 0, ASKED == 0, **ids),
    "source": lambda s, **ids: mixed_source_detection(s, LABELS, ASKED, **ids),
}
WITHOUT = {
    "top-k": lambda s: top_k_overlap(s, VALUES + 1, k=3),
    "randomisation": lambda s: model_randomisation(s, VALUES[None] + 1),
    "randomisation of a list": lambda s: model_randomisation(s, [VALUES + 1]),
    "removals": lambda s: smallest_removals(s, lambda masks, tests: tests == 0, 3).tolist(),
}


@pytest.mark.parametrize("name", [*WITH_IDS, *WITHOUT])
def test_other_orders_and_names_are_refused_and_positions_and_values_taken(name):
    function = {**WITH_IDS, **WITHOUT}[name]
    want = function(VALUES)
    plain = Scores(VALUES)
    assert function(plain) == want
    assert function(plain.select(train_ids=range(N), test_ids=range(M))) == want
    for scores in (
        plain.select(train_ids=MOVED),
        plain[:, [1, 0, 2, 3, 4]],
        Scores(VALUES, *NAMES),
    ):
        with pytest.raises(InputError, match=r"not their positions.*\.values of scores"):
            function(scores)
        assert function(scores.values) == function(np.asarray(scores.values))


@pytest.mark.parametrize("name", list(WITH_IDS))
def test_given_ids_put_scores_into_the_order_of_the_other_arguments(name):
    function = WITH_IDS[name]
    want = function(VALUES)
    tests = [3, 1, 0, 4, 2]
    positions = {"train_ids": range(N), "test_ids": range(M)}
    moved = Scores(VALUES).select(train_ids=MOVED, test_ids=tests)
    assert function(moved.values) != want  # what it would silently have been
    assert function(moved, **positions) == want
    assert function(Scores(VALUES).select(train_ids=MOVED), train_ids=range(N)) == want
    named = Scores(VALUES, *NAMES).select(train_ids=[NAMES[0][i] for i in MOVED])
    assert function(named, train_ids=NAMES[0], test_ids=NAMES[1]) == want
    with pytest.raises(InputError, match=r"the test_ids of scores are 'b0', 'b1', 'b2', \.\.\."):
        function(named, train_ids=NAMES[0])
    with pytest.raises(InputError, match="no train example has the id 'c'"):
        function(named, train_ids=["c", *NAMES[0][1:]], test_ids=NAMES[1])
    with pytest.raises(InputError, match="train_ids given, but the scores are a ndarray"):
        function(VALUES, train_ids=range(N))


def test_some_rows_are_chosen_by_the_ids_of_those_left_out():
    left_out = [7, 2, 11, 5, 3]
    want = loo_correlation(VALUES[left_out], VALUES[left_out] + 1, higher_is_better=False)
    found = loo_correlation(
        Scores(VALUES), VALUES[left_out] + 1, higher_is_better=False, train_ids=left_out
    )
    assert found == want


def test_two_scores_must_have_the_same_ids():
    one, two = Scores(VALUES, *NAMES), Scores(VALUES**3, *NAMES)
    moved = two.select(train_ids=[NAMES[0][i] for i in MOVED])
    pairs = {
        "others": lambda a, b: top_k_overlap(a, b, k=3),
        "outcomes": lambda a, b: loo_correlation(a, b, higher_is_better=False),
        "randomised": lambda a, b: model_randomisation(a, [b]),
        "those of another seed": lambda a, b: rank_stability([a, b]),
    }
    for what, function in pairs.items():
        assert function(one, two) == function(Scores(VALUES), VALUES**3)
        with pytest.raises(InputError, match=f"'a0', 'a1', 'a2', ..., {what} '"):
            function(one, moved)
        with pytest.raises(InputError, match="not their positions"):
            function(VALUES, moved)
        assert function(one, moved.select(train_ids=one.train_ids)) == function(one, two)


def test_parts_know_the_ids_of_their_world():
    truth = effects()
    plain = evidence_of(truth, Additive(truth))
    world = plain.world
    want = scores_of("m", plain)
    named = Scores(truth, world.train_ids, world.test_ids)
    order = [int(i) for i in np.random.default_rng(1).permutation(24)]
    moved = named.select(
        train_ids=[world.train_ids[i] for i in order], test_ids=world.test_ids[::-1]
    )
    for scores in (Scores(truth), named, moved):
        given = evidence_of(scores, Additive(truth))
        assert (scores_of("m", given) == want).all()
        assert ClassDetection().measure(given) == ClassDetection().measure(plain)
    assert (moved.values.numpy() != want).any()
    with pytest.raises(
        InputError, match=r"m: the scores have 24 train_ids 24, 25, 26, \.\.\., the"
    ):
        scores_of("m", evidence_of(Scores(truth, range(24, 48)), Additive(truth)))
    with pytest.raises(InputError, match="the scores have 5 test_ids 'b0'"):
        scores_of("m", evidence_of(named[:, :5], Additive(truth)))
