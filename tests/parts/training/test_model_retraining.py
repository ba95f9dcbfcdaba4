"""ModelRetraining: its fingerprint, and what is refused before anything is trained."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from attrs import evolve
from dattri_parts.training import ModelRetraining, Optimum, Recipe, random_subsets
from torch import nn
from training_toys import M, N, classes, logistic, network, retraining

import dattri_core as dattri

RECIPE = Recipe(2, 10, 0.1)


def _scaled():
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(2)
    return model


def _frozen():
    model = network()
    model[0].weight.requires_grad_(False)
    return model


def _wavy():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, eps=1e-3), nn.Tanh(), nn.Linear(8, 3))


def _rectified():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))


def _moved():
    inputs, labels = classes()
    inputs[5, 2] += 1e-3
    return inputs, labels


def _relabelled():
    inputs, labels = classes()
    labels[5] = (labels[5] + 1) % 3
    return inputs, labels


def test_it_is_a_retraining():
    held = retraining(network, RECIPE, together=3)
    assert isinstance(held, dattri.Retraining)
    assert (held.n_train, held.n_test, held.together) == (N, M, 3)
    bare = ModelRetraining(network, RECIPE, "cross-entropy", classes(), classes(), ["loss"])
    assert bare.about == {}
    assert bare.fingerprint != evolve(bare, about={"scaled": True}).fingerprint


def test_what_outcomes_depend_on_is_in_the_fingerprint_and_nothing_else():
    base = retraining(network, RECIPE).fingerprint
    same = [
        retraining(network, RECIPE),
        retraining(network, evolve(RECIPE, keep=(1,))),
        retraining(network, RECIPE, together=5),
        retraining(network, RECIPE, threads=None),
        retraining(network, RECIPE, targets=["loss"]),
    ]
    assert {held.fingerprint for held in same} == {base}
    other = [
        retraining(network, evolve(RECIPE, epochs=3)),
        retraining(network, evolve(RECIPE, clip=1.0)),
        retraining(network, evolve(RECIPE, optimizer="adamw")),
        retraining(logistic, RECIPE),
        retraining(logistic, Optimum(0.1)),
        retraining(logistic, Optimum(0.2)),
        retraining(_scaled, RECIPE),
        retraining(_frozen, RECIPE),
        retraining(_wavy, RECIPE),
        retraining(_rectified, RECIPE),
        retraining(partial(network, torch.float64), RECIPE, partial(classes, dtype=torch.float64)),
        retraining(network, RECIPE, train_data=_moved()),
        retraining(network, RECIPE, train_data=_relabelled()),
        retraining(network, RECIPE, test_data=classes(M, seed=2)),
        retraining(network, RECIPE, targets=("loss", "margin")),
        retraining(network, RECIPE, about={"inputs": "scaled"}),
        retraining(network, RECIPE, train_data={"input": classes()[0], "labels": classes()[1]}),
    ]
    assert len({base, *(held.fingerprint for held in other)}) == 1 + len(other)


def test_another_process_gives_the_same_fingerprint_and_models():
    code = """
import json, sys
sys.path.insert(0, sys.argv[1])
from training_toys import *
held = retraining(network, Recipe(2, 10, 0.1))
(state,) = held.train([everything()])
print(json.dumps([held.fingerprint, state["0.weight"].tolist()]))
"""
    folder = str(__file__).rpartition("/")[0]
    out = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=True
    )
    held = retraining(network, RECIPE)
    (state,) = held.train([dattri.Counterfactual([True] * N)])
    assert json.loads(out.stdout) == [held.fingerprint, state["0.weight"].tolist()]


def _build_nothing():
    return None


def _flat():
    return nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "crossentropy"}, "no loss named 'crossentropy'; did you mean 'cross-entropy'"),
        ({"targets": ("margins",)}, "no target named 'margins'; did you mean 'margin'"),
        ({"targets": ()}, "no targets"),
        ({"targets": ("loss", "loss")}, "given twice"),
        ({"together": 0}, "together is 0"),
        ({"train_data": classes()[0]}, "has no labels"),
        ({"test_data": {"x": classes()[0]}}, "are sought under 'labels'"),
        ({"train_data": (classes()[0], classes()[1][:9])}, "disagree on the number of examples"),
        ({"test_data": (classes()[0][:0], classes()[1][:0])}, "test_data holds no example"),
        ({"about": {"model": object()}}, "JSON cannot hold"),
        ({"train_data": (classes()[0], classes()[1] + 1)}, "go from 1 to 3 for outputs of shape"),
        ({"test_data": (classes()[0], classes()[1] - 1)}, "labels of test_data go from -1 to 1"),
        ({"build": _build_nothing}, "build returned a NoneType"),
        ({"build": lambda: nn.Flatten()}, "nothing to train"),
        ({"build": lambda: nn.Flatten(0), "loss": "squared-error"}, "nothing to train"),
        (
            {"loss": "squared-error"},
            r"cannot take outputs \(2, 3\) and labels \(2,\) of train_data",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(monkeypatch, change, message):
    monkeypatch.setattr("dattri_parts.training.retraining.train_one", pytest.fail)
    given = {
        "build": network,
        "recipe": RECIPE,
        "loss": "cross-entropy",
        "train_data": classes(),
        "test_data": classes(M, seed=1),
        "targets": ("loss",),
        "about": {},
        **change,
    }

    def start():
        held = ModelRetraining(**given)
        held.fingerprint
        held.train([dattri.Counterfactual([True] * N)])

    with pytest.raises(dattri.InputError, match=message):
        start()


def test_masks_of_another_train_set_are_refused_at_once():
    held = retraining(network, RECIPE)
    with pytest.raises(dattri.InputError, match="has 39 truth values, and there are 40"):
        held.train([*random_subsets(N, 2), *random_subsets(39, 1)])
    with pytest.raises(dattri.InputError, match="keeps none"):
        dattri.Counterfactual([False] * N)
