"""Training with a recorded step is training: the same weights, whatever the batches and rule."""

import warnings

import pytest
import torch
import training_toys as toys
from dattri_parts.training import Recipe
from oracles.taped_device import pretend
from torch import nn

import dattri_core as dattri

RECIPES = {
    "momentum": Recipe(epochs=3, batch=8, learning_rate=0.2, momentum=0.9, weight_decay=1e-2),
    "one batch": Recipe(epochs=6, batch=100, learning_rate=0.2, warmup=3),
    "a smaller last batch": Recipe(epochs=3, batch=7, learning_rate=0.2, momentum=0.9),
    "clipped": Recipe(epochs=3, batch=9, learning_rate=0.2, clip=0.05),
    "adamw": Recipe(epochs=3, batch=8, learning_rate=0.05, optimizer="adamw", keep=(1, 2)),
}


class Tied(nn.Module):
    """A weight that is used twice, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(toys.WIDTH, toys.WIDTH)
        self.idle = nn.Linear(2, 2)
        self.out = nn.Linear(toys.WIDTH, toys.CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def image_network():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, toys.CLASSES),
    )


def dropping():
    hidden = (nn.Linear(toys.WIDTH, 8), nn.Dropout(0.5), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(8, toys.CLASSES))


def states(build, recipe, recorded, seed=3, device="cpu"):
    made = toys.retraining(build, recipe, recorded=recorded, device=device)
    return made.run(toys.everything(seed=seed)).states


@pytest.mark.parametrize("build", [toys.network, Tied, image_network, dropping])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recorded_steps_are_those_of_python(build, recipe, monkeypatch):
    want = states(build, recipe, recorded=False)
    tapes = pretend(monkeypatch)
    got = states(build, recipe, recorded=True)
    (tape,) = tapes
    whole = recipe.epochs * (toys.N // min(recipe.batch, toys.N))
    assert tape.replays == whole - 3  # all but those before the recording
    for one, other in zip(want, got, strict=True):
        assert toys.difference(one, other) == 0.0


def test_what_cannot_be_recorded_is_run_from_python(monkeypatch):
    class Waits(nn.Linear):
        def forward(self, x):
            return super().forward(x) if float(x.sum()) < 1e9 else x

    def build():
        return Waits(toys.WIDTH, toys.CLASSES)

    recipe = RECIPES["momentum"]
    want = states(build, recipe, recorded=False)
    tapes = pretend(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"cannot be recorded.*capturing.*recorded=False"):
        got = states(build, recipe, recorded=True)
    assert [tape.replays for tape in tapes] == [0]
    assert toys.difference(want[-1], got[-1]) == 0.0


def test_a_loss_that_diverges_is_refused_all_the_same(monkeypatch):
    pretend(monkeypatch)
    recipe = Recipe(epochs=9, batch=8, learning_rate=3e38)
    with pytest.raises(dattri.NumericsError, match=r"the loss is .* in epoch"):
        states(toys.logistic, recipe, recorded=True)


def test_devices_that_do_not_record_train_as_ever():
    recipe = RECIPES["momentum"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = states(toys.network, recipe, recorded=True)
    assert toys.difference(states(toys.network, recipe, recorded=False)[-1], got[-1]) == 0.0


def test_the_fingerprint_does_not_ask_how_steps_are_launched():
    one, other = (
        toys.retraining(toys.network, RECIPES["momentum"], recorded=way) for way in (True, False)
    )
    assert one.fingerprint == other.fingerprint


@pytest.mark.cuda
@pytest.mark.parametrize("build", [image_network, dropping])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_cuda_device_records(recipe, build):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = states(build, recipe, recorded=True, device="cuda")
    want = states(build, recipe, recorded=False, device="cuda")
    for one, other in zip(want, got, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)
