"""What is measured of a trained model, against loops over examples and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dattri_parts.training import Recipe
from dattri_parts.training import retraining as module
from torch import nn
from training_toys import (
    M,
    NextToken,
    classes,
    network,
    numbers,
    retraining,
    sequences,
)

import dattri_core as dattri

RECIPE = Recipe(1, 10, 0.1)
ALL = ("loss", "margin", "logit", "correct")


def by_hand(logits, label):
    p = logits.softmax(0)[label].item()
    return {
        "loss": -np.log(p),
        "margin": np.log(p / (1 - p)),
        "logit": logits[label].item(),
        "correct": float(logits.argmax() == label),
    }


@pytest.mark.parametrize("at_once", [2, 512])
def test_a_classifier(monkeypatch, at_once):
    monkeypatch.setattr(module, "MEASURED", at_once)
    inputs, labels = classes(M, seed=1)
    model = network().eval()
    found = retraining(network, RECIPE, targets=ALL).measure(model.state_dict())
    logits = model(inputs).detach().double()
    for target in ALL:
        want = [by_hand(row, label)[target] for row, label in zip(logits, labels, strict=True)]
        assert found[target].dtype == np.float64
        assert found[target].shape == (M,)
        assert np.abs(found[target] - want).max() < 1e-6


def test_a_language_model_is_measured_by_sums_over_the_tokens_that_are_predicted():
    tokens, labels = sequences(M, seed=1)
    model = NextToken().eval()
    held = retraining(NextToken, RECIPE, sequences, "causal-lm", ALL)
    found = held.measure(model.state_dict())
    logits = model(tokens).detach().double()
    for i in range(M):
        pairs = [(t, labels[i, t + 1]) for t in range(6) if labels[i, t + 1] != -100]
        assert len(pairs) in (3, 6)
        for target in ALL:
            want = sum(by_hand(logits[i, t], label)[target] for t, label in pairs)
            assert abs(found[target][i] - want) < 1e-6


def test_a_regression_has_a_loss_and_no_class():
    inputs, values = numbers(M, seed=1)
    build = lambda: nn.Linear(6, 1).double()  # noqa: E731
    model = build()
    held = retraining(build, RECIPE, numbers, "squared-error")
    want = ((model(inputs)[:, 0] - values) ** 2 / 2).detach().numpy()
    assert np.abs(held.measure(model.state_dict())["loss"] - want).max() < 1e-12
    with pytest.raises(dattri.InputError, match=r"\['margin'\] are of a class label"):
        retraining(build, RECIPE, numbers, "squared-error", ("loss", "margin"))


def test_margins_are_exact_where_the_model_is_sure():
    model = nn.Linear(6, 3).requires_grad_(False)
    model.weight.zero_()
    model.bias.copy_(torch.tensor([60.0, 0.0, -60.0]))
    found = retraining(lambda: nn.Linear(6, 3), RECIPE, targets=("margin",))
    _, labels = classes(M, seed=1)
    sure = found.measure(model.state_dict())["margin"][(labels == 0).numpy()]
    assert np.abs(sure - 60.0).max() < 1e-12


def test_dropout_is_off_and_the_state_is_left_alone():
    build = lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.9))  # noqa: E731
    held = retraining(build, RECIPE, targets=ALL)
    state = build().state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    first, second = held.measure(state), held.measure(state)
    assert all(np.array_equal(first[t], second[t]) for t in ALL)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_which_way_is_good():
    held = retraining(network, RECIPE, targets=("margin", "loss"))
    assert dict(held.targets) == {"margin": True, "loss": False}


def test_states_and_outcomes_that_cannot_be_are_refused():
    held = retraining(network, RECIPE)
    state = network().state_dict()
    with pytest.raises(dattri.InputError, match=r"lacks, or has too many of, \['0\.weight'\]"):
        held.measure({name: t for name, t in state.items() if name != "0.weight"})
    with pytest.raises(dattri.NumericsError, match="the loss is nan on test example 0"):
        held.measure({**state, "0.weight": state["0.weight"] * torch.nan})
