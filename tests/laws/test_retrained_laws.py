"""Attributors that ask for models of other train sets: a good one meets the laws, others not."""

import numpy as np
import pytest
import torch
from toy_retrained import ToyDrawn, ToyLeaveOneOut

import dattri_core as dattri
from dattri_core.laws import check
from dattri_core.laws.retrained import RATE, Refitted
from dattri_core.laws.worlds import regression


def failed(part):
    report = check("method", part)
    return {f.law for f in report.findings if f.status == "failed"}


@pytest.mark.parametrize("part", [ToyLeaveOneOut(), ToyDrawn()])
def test_a_good_one_meets_every_law(part):
    assert failed(part) == set()


@pytest.mark.parametrize(
    ("changes", "law"),
    [
        ({"rolled": 1}, "scores-follow-the-models"),
        ({"negative": True}, "scores-follow-the-models"),
        ({"noisy": True}, "scores-are-repeatable"),
    ],
)
def test_scores_that_are_drawn_follow_the_models_too(changes, law):
    assert law in failed(ToyDrawn(**changes))


def test_another_target_than_that_of_the_task_is_refused():
    report = check("method", ToyLeaveOneOut(target="margin"))
    details = {finding.law: finding.detail for finding in report.failures}
    assert "asked for the target 'margin', that of the task" in details["target-has-a-direction"]


@pytest.mark.parametrize(
    ("changes", "law"),
    [
        ({"signed": False}, "target-has-a-direction"),
        ({"rolled": 1}, "permuted-train-rows-permute-scores"),
        ({"rolled": 1}, "equal-examples-score-equal"),
        ({"noisy": True}, "scores-are-repeatable"),
    ],
)
def test_a_broken_one_breaks_its_law(changes, law):
    assert law in failed(ToyLeaveOneOut(**changes))


def test_the_models_of_the_ground_truth_minimise_their_objective():
    world = regression()
    truth = Refitted(world.task(), world.train, world.test)
    mask = np.array([True, False] * 4 + [True])
    (found,) = truth.outcomes([dattri.Counterfactual(mask)], "loss")
    inputs, wanted = (side[torch.from_numpy(mask)] for side in world.train)
    n = len(inputs)
    # mean |W x - y|^2 / 2 + rate / 2 |W|^2 as plain least squares of more rows
    rows = torch.cat([inputs, torch.ones(n, 1).double()], 1) / n**0.5
    more = RATE**0.5 * torch.eye(4, dtype=torch.float64)
    wide = torch.cat([wanted / n**0.5, torch.zeros(4, 2, dtype=torch.float64)])
    solution = torch.linalg.lstsq(torch.cat([rows, more]), wide).solution
    model = torch.nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.copy_(solution[:3].T)
        model.bias.copy_(solution[3])
        expected = world.loss(model, world.test)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
