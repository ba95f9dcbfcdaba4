"""Trained networks through the store: first-order predictions, and stacks that are resumed."""

from __future__ import annotations

import json

import numpy as np
import torch
from dattri_parts.training import ModelRetraining, Optimum, Recipe, random_subsets
from dattri_retrain import CounterfactualStore
from retrain_plans import same
from torch import nn

import dattri_core as dattri
from dattri_core import Counterfactual, Task

N, M = 200, 6


def data():
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(N + M, 4, generator=random)
    labels = (inputs[:, 0] + inputs[:, 1] > 0).long()
    return (inputs[:N], labels[:N]), (inputs[N:], labels[N:])


def linear():
    return nn.Linear(4, 2)


def retraining(recipe, together=1):
    train, test = data()
    return ModelRetraining(
        build=linear,
        recipe=recipe,
        loss="cross-entropy",
        train_data=train,
        test_data=test,
        targets=("loss", "margin"),
        about={"model": "linear"},
        together=together,
    )


def test_leave_one_out_of_a_convex_model_is_what_influence_predicts(tmp_path):
    made = retraining(Optimum(l2=0.1), together=16)
    train, test = ((inputs.double(), labels) for inputs, labels in data())
    model = linear().double()
    full = Counterfactual(np.ones(N, bool))
    model.load_state_dict(next(iter(made.train([full]))))
    task = Task(model, "cross-entropy")
    store = CounterfactualStore(tmp_path, made)
    truth = dattri.attribute(task, train, test, "leave-one-out", ground_truth=store)
    predicted = dattri.attribute(task, train, test, "if-explicit", damping=0.1)
    x, y = (np.asarray(s.values).ravel() for s in (truth, predicted))
    assert np.corrcoef(x, y)[0, 1] > 0.999
    assert 1 < x @ y / (y @ y) < 1.05  # the same scale; the rest is of second order in 1 / n


def test_stacked_models_that_are_resumed_are_the_same_to_the_last_bit(tmp_path):
    plan = random_subsets(N, 14)
    made = retraining(Recipe(epochs=2, batch=10, learning_rate=0.5), together=4)
    whole = CounterfactualStore(tmp_path / "whole", made)
    whole.fill(plan)
    parts = CounterfactualStore(tmp_path / "parts", made)
    parts.fill(plan, index=(2, 3))
    assert parts.fill(plan) == 10
    assert same(parts.rows(), whole.rows())
    one = CounterfactualStore(tmp_path / "one", retraining(made.recipe))
    assert one.path.name == whole.path.name  # how many are trained at once is no other recipe
    for target in ("loss", "margin"):
        assert np.allclose(one.outcomes(plan, target), whole.outcomes(plan, target), atol=1e-5)


def test_a_method_with_a_store_of_tensors_is_described_as_plain_data(tmp_path):
    store = CounterfactualStore(tmp_path, retraining(Optimum(l2=0.1)))
    written = dattri.describe_part(dattri.method("leave-one-out", ground_truth=store))
    assert written["ground_truth"]["folder"] == str(tmp_path)
    json.dumps(written)
