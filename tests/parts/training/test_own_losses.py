"""ModelRetraining with a loss of one's own: the shipped numbers again, and what is refused."""

from __future__ import annotations

import pickle

import attrs
import numpy as np
import pytest
import torch
from dattri_parts.training import Optimum, Recipe
from torch import nn
from training_toys import M, classes, difference, everything, logistic, network, retraining

import dattri_core as dattri
from dattri_core import InputError

RECIPE = Recipe(3, 10, 0.3)


def outputs(model, batch):
    return model(batch[0])


def criterion(logits, batch):
    return nn.functional.cross_entropy(logits, batch[1], reduction="none")


def whole(model, batch):
    return criterion(model(batch[0]), batch)


def margin(logits, batch):
    p = logits.softmax(1).gather(1, batch[1][:, None]).squeeze(1)
    return p.log() - (-p).log1p()


OWN = dattri.Loss(outputs, criterion, "own", margin=margin)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("own", [whole, OWN, dattri.cross_entropy])
def test_the_shipped_loss_written_again_gives_the_shipped_models_and_outcomes(own, together):
    plan = [everything(seed=seed) for seed in range(3)]
    want = retraining(network, RECIPE, together=together)
    held = retraining(network, RECIPE, loss=own, together=together)
    for found, expected in zip(held.train(plan), want.train(plan), strict=True):
        assert difference(found, expected) < 1e-6
        assert np.abs(held.measure(found)["loss"] - want.measure(found)["loss"]).max() < 1e-6


def test_a_margin_of_ones_own_is_measured():
    held = retraining(network, RECIPE, loss=OWN, targets=("loss", "margin"))
    want = retraining(network, RECIPE, targets=("loss", "margin"))
    state = network().state_dict()
    assert np.abs(held.measure(state)["margin"] - want.measure(state)["margin"]).max() < 1e-6


def test_it_needs_no_labels_and_its_mean_is_minimised():
    """Autoencoding: the step of SGD is that of the mean of squares, by autograd."""

    def build():
        return nn.Linear(6, 6)

    def squares(model, batch):
        return (model(batch) - batch).square().sum(1)

    inputs = classes()[0]
    held = attrs.evolve(
        retraining(network, Recipe(1, 40, 0.1, schedule="constant")),
        build=build,
        loss=squares,
        train_data=inputs,
        test_data=inputs[:M],
    )
    (found,) = held.train([everything()])
    torch.manual_seed(0)
    model = build()
    torch.autograd.backward(squares(model, inputs).mean())
    assert torch.allclose(found["weight"], model.weight - 0.1 * model.weight.grad, atol=1e-6)
    model.load_state_dict(found)
    assert np.allclose(held.measure(found)["loss"], squares(model, inputs[:M]).detach(), atol=1e-5)


def test_it_goes_to_other_processes_with_its_fingerprint():
    held = retraining(network, RECIPE, loss=OWN)
    assert pickle.loads(pickle.dumps(held)).fingerprint == held.fingerprint
    assert held.fingerprint != retraining(network, RECIPE, loss=whole).fingerprint


def _reaches_in(model, batch):
    return model.get_submodule("0")(batch[0]).sum(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": whole, "targets": ("margin",)},
            r"\['margin'\] are not known of the loss",
        ),
        ({"loss": OWN, "targets": ("logit", "loss")}, r"\['logit'\].*has \['loss', 'margin'\]"),
        ({"loss": dattri.Loss(outputs, criterion, "causal-lm")}, "named 'causal-lm', as a shipped"),
        ({"loss": 3}, r"the loss is 3 \(int\), expected one of \['causal-lm'"),
        ({"loss": lambda model, batch: whole(model, batch).mean()}, r"has shape \(\)"),
        ({"loss": lambda model, batch: [1.0]}, "gave a list, expected a tensor"),
        ({"loss": _reaches_in}, "asks the model for more than its outputs.*get_submodule"),
    ],
)
def test_what_it_cannot_be_is_refused_before_training(monkeypatch, options, message):
    monkeypatch.setattr("dattri_parts.training.retraining.train_one", pytest.fail)
    with pytest.raises(InputError, match=message):
        retraining(network, RECIPE, **options).train([everything()])


def test_an_optimum_is_of_a_shipped_loss():
    held = retraining(logistic, Optimum(0.1), loss=OWN)
    with pytest.raises(InputError, match="the loss 'own' is trained by a Recipe"):
        list(held.train([everything()]))
