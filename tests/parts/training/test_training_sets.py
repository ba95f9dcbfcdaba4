"""Train sets that might have been."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dattri_parts.training import leave_groups_out, leave_one_out, random_subsets

import dattri_core as dattri


def test_each_example_is_left_out_once():
    sets = leave_one_out(5, seed=3)
    assert np.array_equal(np.stack([s.mask for s in sets]), ~np.eye(5, dtype=bool))
    assert {s.seed for s in sets} == {3}
    assert [s.mask.tolist() for s in leave_one_out(4, indices=[2])] == [[True, True, False, True]]


def test_each_group_is_left_out_once_however_it_is_given():
    labels = torch.tensor([0, 1, 0, 2, 1])
    want = [[False, True, False, True, True], [True, False, True, True, False], [True] * 5]
    want[2][3] = False
    positions = [[0, 2], (4, 1, 4), np.array([3])]
    for groups in (positions, [labels == c for c in range(3)], [labels.numpy() == 0, [1, 4], [3]]):
        sets = leave_groups_out(5, groups, seed=7)
        assert [s.mask.tolist() for s in sets] == want
        assert {s.seed for s in sets} == {7}
    alone = leave_groups_out(4, [[i] for i in range(4)])
    assert [s.key for s in alone] == [s.key for s in leave_one_out(4)]


def test_a_subset_depends_on_its_number_and_the_seed_alone():
    many, few = random_subsets(30, 9, seed=2), random_subsets(30, 4, seed=2)
    assert [s.key for s in many[:4]] == [s.key for s in few]
    assert len({s.key for s in many}) == len({s.seed for s in many}) == 9
    other = random_subsets(30, 4, seed=3)
    assert not {s.key for s in other} & {s.key for s in few}
    assert [s.mask.sum() for s in random_subsets(30, 3, fraction=0.1)] == [3, 3, 3]
    assert random_subsets(3, 1, fraction=1)[0].mask.all()


def test_subsets_are_spread_evenly():
    share = np.mean([s.mask for s in random_subsets(50, 400, fraction=0.4)], axis=0)
    assert abs(share.mean() - 0.4) < 1e-12
    assert (abs(share - 0.4) < 5 * np.sqrt(0.24 / 400)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: leave_one_out(1), "of 1 examples none can be left out"),
        (lambda: leave_one_out(3, indices=[0, 3]), r"positions \[3\] of 3 examples"),
        (lambda: leave_groups_out(3, []), "got no groups"),
        (lambda: leave_groups_out(3, [[0], []]), "group 1 holds no example"),
        (lambda: leave_groups_out(3, [[0, 1, 2]]), "group 0 holds all 3 examples"),
        (lambda: leave_groups_out(3, [[0, 3, -1]]), r"positions \[3, -1\] of 3 examples"),
        (lambda: leave_groups_out(3, [[True, False]]), r"bool of shape \(2,\)"),
        (lambda: leave_groups_out(3, [0, 1]), r"group 0 is int64 of shape \(\)"),
        (lambda: leave_groups_out(3, [[0.0]]), "group 0 is float64"),
        (lambda: leave_groups_out(3, [[0, 1, 0]]), "group 0 is 3 zeros and ones"),
        (lambda: random_subsets(9, 1, fraction=0.01), "keeps at least one example"),
        (lambda: random_subsets(9, 1, fraction=1.1), r"fraction 1\.1"),
        (lambda: random_subsets(9, 0), "count is 0"),
    ],
)
def test_sets_that_cannot_be_are_refused(call, message):
    with pytest.raises(dattri.InputError, match=message):
        call()
