"""Recipes: rates, one model against a plain loop of torch, randomness, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from attrs import evolve
from dattri_parts.training import Recipe, random_subsets
from torch import nn
from training_toys import (
    N,
    NextToken,
    classes,
    difference,
    everything,
    network,
    numbers,
    retraining,
    sequences,
    tagged,
)

import dattri_core as dattri

SGD = Recipe(4, 16, 0.2, weight_decay=0.01, momentum=0.9)
ADAMW = Recipe(
    4,
    16,
    0.02,
    weight_decay=0.1,
    optimizer="adamw",
    betas=(0.8, 0.95),
    schedule="linear",
    warmup=5,
    clip=0.3,
)
LOSSES = {
    "cross-entropy": (network, classes, nn.functional.cross_entropy),
    "squared-error": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double(),
        numbers,
        lambda out, y: ((out[:, 0] - y) ** 2).mean() / 2,
    ),
    "causal-lm": (
        NextToken,
        sequences,
        lambda out, y: nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    ),
    "token-cross-entropy": (
        NextToken,
        tagged,
        lambda out, y: nn.functional.cross_entropy(out.flatten(0, 1), y.flatten()),
    ),
}


def plain_loop(build, recipe, data, criterion, index, seed):
    """The training written out: torch's optimisers and schedules on indexed tensors."""
    torch.manual_seed(seed)
    model = build()
    order = torch.Generator().manual_seed(seed + 1)
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            model.parameters(), 1.0, recipe.betas, weight_decay=recipe.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), 1.0, recipe.momentum, weight_decay=recipe.weight_decay
        )
    total, step = recipe.epochs * math.ceil(len(index) / recipe.batch), 0
    for epoch in range(recipe.epochs):
        for chosen in index[torch.randperm(len(index), generator=order)].split(recipe.batch):
            rate = recipe.learning_rate
            if recipe.schedule == "cosine":
                rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2
            elif recipe.schedule == "linear":
                rate *= 1 - step / total
            rate *= min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else 1.0
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            criterion(model(data[0][chosen]), data[1][chosen]).backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            step += 1
    return model.state_dict()


@pytest.mark.parametrize("recipe", [SGD, ADAMW, evolve(SGD, schedule="constant", batch=500)])
@pytest.mark.parametrize("loss", LOSSES)
def test_training_is_that_of_a_plain_loop(recipe, loss):
    build, data, criterion = LOSSES[loss]
    (chosen,) = random_subsets(N, 1, fraction=0.55, seed=4)
    index = torch.tensor(chosen.mask).nonzero()[:, 0]
    want = plain_loop(build, recipe, data(), criterion, index, chosen.seed)
    (found,) = retraining(build, recipe, data, loss).train([chosen])
    assert difference(found, want) < (1e-12 if loss == "squared-error" else 1e-6)
    other = dattri.Counterfactual(chosen.mask, 7)
    (another,) = retraining(build, recipe, data, loss).train([other])
    assert difference(another, want) > 1e-2


def test_the_states_on_the_way_are_those_of_the_epochs():
    run = retraining(network, evolve(SGD, keep=(1, 3))).run(everything())
    assert run.epochs == (1, 3, 4)
    assert run.learning_rates == tuple(SGD.rate(3 * (epoch - 1), 3) for epoch in (1, 3, 4))
    assert run.learning_rates[0] == 0.2
    assert difference(run.states[-1], run.model.state_dict()) == 0
    assert not run.model.training
    assert difference(run.states[0], run.states[1]) > 1e-3
    again = retraining(network, SGD).run(everything(), keep=(1,))
    assert again.epochs == (1, 4)
    assert difference(again.states[0], run.states[0]) == 0
    with pytest.raises(dattri.InputError, match="expected epochs from 1 to 4"):
        retraining(network, SGD).run(everything(), keep=(5,))


def test_the_cosine_falls_to_a_hundredth_and_the_line_to_nothing():
    long = evolve(SGD, epochs=1000, schedule="cosine")
    assert long.rate(0, 1) == 0.2
    assert abs(long.rate(500, 1) - 0.2 * 0.505) < 1e-12
    assert abs(long.rate(999, 1) - 0.002) < 1e-5
    line = evolve(SGD, schedule="linear")
    assert [line.rate(step, 5) for step in (0, 10, 19)] == pytest.approx([0.2, 0.1, 0.01])
    warm = evolve(SGD, schedule="constant", warmup=4)
    assert [warm.rate(step, 5) for step in range(6)] == pytest.approx(
        [0.05, 0.1, 0.15, 0.2, 0.2, 0.2]
    )


def test_dropout_and_batch_statistics_come_from_the_seed_alone():
    def build():
        return nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )

    sets = random_subsets(N, 2)
    first = list(retraining(build, SGD).train(sets))
    torch.rand(5)
    second = list(retraining(build, SGD).train(sets[::-1]))[::-1]
    assert difference(first[0], second[0]) == difference(first[1], second[1]) == 0
    assert first[0]["1.num_batches_tracked"] == 8


def test_the_users_random_numbers_and_threads_are_left_alone():
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    held = retraining(network, SGD, together=2)
    states = list(held.train(random_subsets(N, 2)))
    held.measure(states[0])
    held.fingerprint
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("together", [1, 4])
def test_a_loss_that_is_not_finite_names_the_counterfactual_and_the_epoch(together):
    inputs, labels = classes()
    inputs[3, 0] = float("inf")
    sets = random_subsets(N, 4, seed=1)
    first = next(s for s in sets if s.mask[3])
    held = retraining(network, SGD, train_data=(inputs, labels), together=together)
    message = rf"nan in epoch 1 of the counterfactual of 20 examples, seed {first.seed}"
    with pytest.raises(dattri.NumericsError, match=message):
        list(held.train([first]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected an integer from 1"),
        ({"batch": 1.5}, r"batch is 1\.5"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0, expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"momentum": 1.0}, "momentum is 1.0, expected a number from 0 to below 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"optimizer": "adam"}, "no optimizer named 'adam'; did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"optimizer": "adamw"}, "momentum is 0.9, expected 0: 'adamw' has betas"),
        ({"keep": (0,)}, "keep is"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"warmup": -1}, "warmup is -1"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(dattri.InputError, match=message):
        evolve(SGD, **change)
