"""Stacked training gives the models of one by one, whatever else is in the stack."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attrs import evolve
from dattri_parts.training import leave_one_out, random_subsets, stacked
from test_training_recipe import ADAMW, LOSSES, SGD
from torch import nn
from training_toys import N, NextToken, classes, difference, network, retraining, sequences

import dattri_core as dattri

SETS = [*random_subsets(N, 5, seed=1), *leave_one_out(N, indices=[0, 7], seed=3)]
FULL_BATCH = evolve(SGD, batch=1000, epochs=10)


@pytest.mark.parametrize("recipe", [SGD, ADAMW, FULL_BATCH])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_stack_gives_the_models_of_one_by_one(recipe, loss):
    build, data, _ = LOSSES[loss]
    want = list(retraining(build, recipe, data, loss).train(SETS))
    found = list(retraining(build, recipe, data, loss, together=len(SETS)).train(SETS))
    assert max(map(difference, found, want)) < 1e-5
    assert [list(state) for state in found] == [list(state) for state in want]
    assert difference(want[0], want[1]) > 1e-2


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network(torch.float64)
        self.head = self.net[-1]

    def forward(self, inputs):
        return self.net(inputs)


def test_a_module_of_two_names_is_trained_like_one_of_one_name():
    data = partial(classes, dtype=torch.float64)
    want = list(retraining(partial(network, torch.float64), SGD, data).train(SETS))
    for together in (1, len(SETS)):
        held = retraining(TwoNames, SGD, data, together=together)
        for state, plain in zip(held.train(SETS), want, strict=True):
            assert all((state[f"net.{k}"] - plain[k]).abs().max() < 1e-12 for k in plain)
        one, other = (
            made.measure(state)
            for made, state in (
                (held, next(iter(held.train(SETS)))),
                (retraining(partial(network, torch.float64), SGD, data), want[0]),
            )
        )
        assert all(abs(one[name] - other[name]).max() < 1e-12 for name in other)


@pytest.mark.parametrize("recipe", [SGD, ADAMW])
def test_in_double_precision_it_does_to_rounding(recipe):
    build, data = partial(network, torch.float64), partial(classes, dtype=torch.float64)
    want = list(retraining(build, recipe, data).train(SETS))
    found = list(retraining(build, recipe, data, together=len(SETS)).train(SETS))
    assert max(map(difference, found, want)) < 1e-12


def test_a_model_does_not_depend_on_the_others():
    data = partial(classes, dtype=torch.float64)
    held = retraining(partial(network, torch.float64), SGD, data, together=7)
    whole = list(held.train(SETS))
    for chosen in ([4], [6, 0], [3, 2, 1], [5, 4, 3, 2, 1, 0]):
        found = held.train([SETS[k] for k in chosen])
        for k, state in zip(chosen, found, strict=True):
            assert difference(state, whole[k]) < 1e-13


def test_more_than_a_stack_holds_come_in_their_order():
    data = partial(classes, dtype=torch.float64)
    build = partial(network, torch.float64)
    want = list(retraining(build, SGD, data).train(SETS))
    found = list(retraining(build, SGD, data, together=3).train(SETS))
    assert max(map(difference, found, want)) < 1e-12


def test_small_memory_makes_small_stacks_of_the_same_models(monkeypatch):
    sizes = []
    real = stacked._Stack

    def spy(models, *args):
        sizes.append(len(models))
        return real(models, *args)

    monkeypatch.setattr(stacked, "_Stack", spy)
    want = list(retraining(network, SGD, together=7).train(SETS))
    assert sorted(sizes) in ([2, 5], [1, 1, 2, 3])  # by the machine's cores
    sizes.clear()
    monkeypatch.setattr(stacked, "WORKING_SET", 1)
    found = list(retraining(network, SGD, together=7).train(SETS))
    assert sizes == [1] * 7
    assert max(map(difference, found, want)) < 1e-6


def test_frozen_parameters_and_tied_weights_stay_so():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.middle = nn.Linear(4, 4)
            self.head = nn.Linear(4, 5)
            self.head.weight = self.embed.weight
            self.middle.weight.requires_grad_(False)

        def forward(self, tokens):
            return self.head(torch.tanh(self.middle(self.embed(tokens))))

    sets = SETS[:3]
    want = list(retraining(Tied, SGD, sequences, "causal-lm").train(sets))
    found = list(retraining(Tied, SGD, sequences, "causal-lm", together=3).train(sets))
    assert max(map(difference, found, want)) < 1e-5
    torch.manual_seed(sets[0].seed)
    start = Tied()
    assert torch.equal(found[0]["middle.weight"], start.middle.weight)
    assert torch.equal(found[0]["head.weight"], found[0]["embed.weight"])
    assert not torch.equal(found[0]["head.weight"], start.head.weight)


def test_batches_of_dicts_are_stacked():
    tokens, labels = sequences()
    test = dict(zip(("tokens", "labels"), sequences(5), strict=True))
    held = retraining(
        NextToken,
        SGD,
        sequences,
        "causal-lm",
        train_data={"tokens": tokens, "labels": labels},
        test_data=test,
        together=3,
    )
    want = retraining(NextToken, SGD, sequences, "causal-lm", together=3)
    assert max(map(difference, held.train(SETS[:3]), want.train(SETS[:3]))) == 0


def _drops():
    return nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.2), nn.Linear(4, 3))


def _counts():
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


class _Branches(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) if inputs.sum() > 0 else -super().forward(inputs)


class _Draws(nn.Linear):
    def forward(self, inputs):
        return super().forward(nn.functional.dropout(inputs, 0.5, self.training))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_drops, r"'1' \(Dropout\) drops a share of 0\.2"),
        (_counts, r"'1' \(BatchNorm1d\) keeps statistics of its batches"),
        (partial(_Branches, 6, 3), "_Branches cannot be vmapped"),
        (partial(_Draws, 6, 3), "_Draws cannot be vmapped"),
    ],
)
def test_models_that_cannot_be_stacked_are_refused_with_what_to_do(build, message):
    with pytest.raises(dattri.InputError, match=message + ".*together=1"):
        list(retraining(build, SGD, together=2).train(SETS))
    assert len(list(retraining(build, SGD).train(SETS[:2]))) == 2


def test_an_error_in_one_stack_stops_the_others(monkeypatch):
    steps = []
    real = stacked._Stack._gradients

    def failing(self, chosen):
        steps.append(1)
        if self.members[0] is first:
            raise ValueError("broken")
        return real(self, chosen)

    long = evolve(SGD, epochs=100_000)
    first = stacked.Member(torch.arange(10), 0, long)
    other = stacked.Member(torch.arange(20), 0, long)
    monkeypatch.setattr(stacked._Stack, "_gradients", failing)
    with pytest.raises(ValueError, match="broken"):
        stacked.train_stacked(
            network,
            dattri.cross_entropy,
            classes(),
            [first, other],
            torch.device("cpu"),
        )
    assert len(steps) < 50_000


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("most", [1, 4, 11, 100])
def test_every_core_has_as_many_stacks(most, workers):
    members = [stacked.Member(torch.arange(5), seed, SGD) for seed in range(50)]
    cut = list(stacked._stacks(members, most, workers))
    sizes = [len(stack) for stack in cut]
    assert [k for stack in cut for k in stack] == list(range(50))
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(cut) % workers == 0 or sizes == [1] * 50
    assert len(cut) - workers < 50 / most  # no more of them than fill the cores once more
