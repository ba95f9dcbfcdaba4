"""Attributors that ask for models of other train sets: a good one meets the laws, others not."""

import attrs
import numpy as np
import pytest
import torch

import dattri_core as dattri
from dattri_core.laws import check
from dattri_core.laws.retrained import RATE, Refitted
from dattri_core.laws.worlds import regression


@attrs.frozen
class ToyLeaveOneOut:
    """n (U(all) - U(all but i)), or something like it."""

    ground_truth: object = None
    signed: bool = True
    rolled: int = 0
    noisy: bool = False

    def attribute(self, task, train, test, *, progress=None, **settings):
        sides = dattri.Examples.of(train, "train"), dattri.Examples.of(test, "test")
        n = len(sides[0])
        masks = [np.ones(n, bool), *~np.eye(n, dtype=bool)]
        plan = [dattri.Counterfactual(mask) for mask in masks]
        found = np.asarray(self.ground_truth.outcomes(plan, "target"))
        utilities = -task.sign * found if self.signed else -found
        effects = n * (utilities[:1] - utilities[1:])
        if self.noisy:
            effects = effects + torch.randn(effects.shape).double().numpy()
        values = torch.from_numpy(np.roll(effects, self.rolled, axis=0).copy())
        return dattri.Scores(values, list(sides[0].ids), list(sides[1].ids), {"n_train": n})


def failed(part):
    report = check("method", part)
    return {f.law for f in report.findings if f.status == "failed"}


def test_a_good_one_meets_every_law():
    assert failed(ToyLeaveOneOut()) == set()


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
