"""Digits with subclasses, a shortcut and two sources: facts fit the images; metrics read them."""

import numpy as np
import pytest
import torch
from dattri_benchmarks.digits import setting as digits

import dattri_core as dattri
from dattri_core import default_registry

SIZE = (300, 200)
CASES = {
    "digits-parity": ("subclasses", "subclass-detection"),
    "digits-marked": ("shortcut", "shortcut-detection"),
    "digits-mixed": ("sources", "mixed-source-detection"),
}


@pytest.fixture(scope="module")
def worlds():
    return {name: default_registry().make("setting", name).load(SIZE, seed=2) for name in CASES}


def known(world, name):
    said = world.facts[CASES[name][0]]
    return np.array(said["train"]), np.array(said["test"])


def test_parity_is_told_and_the_digit_is_not(worlds):
    world, plain = worlds["digits-parity"], digits.load(SIZE, seed=2)
    for side, facts in zip(("train", "test"), known(world, "digits-parity"), strict=True):
        assert np.array_equal(facts, getattr(plain, side)[-1].numpy())
        assert np.array_equal(getattr(world, side)[-1].numpy(), facts % 2)
        assert torch.equal(getattr(world, side)[0], getattr(plain, side)[0])
    assert world.task.model(world.test[0]).shape == (200, 2)


def test_the_mark_is_where_the_facts_say_and_the_model_takes_it_for_the_digit(worlds):
    world, plain = worlds["digits-marked"], digits.load(SIZE, seed=2)
    train, test = known(world, "digits-marked")
    digit = plain.train[-1].numpy() == 8
    assert train[~digit].sum() == 0
    assert train.sum() == np.ceil(0.9 * digit.sum())
    corner = world.test[0].reshape(len(test), 8, 8)[:, :3, :3]
    marked = (corner == 1).flatten(1).all(1).numpy()
    assert np.array_equal(marked, np.arange(200) % 2 == 0)
    assert np.array_equal(test, marked & (plain.test[-1].numpy() == 8))
    for side, facts in (("train", train), ("test", marked)):
        got, want = (getattr(w, side)[0].reshape(len(facts), 8, 8) for w in (world, plain))
        assert bool((got[facts][:, :3, :3] == 1).all())
        assert torch.equal(got[~facts], want[~facts])
        assert torch.equal(got[:, 3:], want[:, 3:])
    others = plain.test[-1].numpy() != 8
    said = world.task.model(world.test[0]).argmax(1).numpy() == 8
    assert said[others & marked].mean() > 0.5 > 0.1 > said[others & ~marked].mean()


def test_every_second_image_is_a_negative(worlds):
    world, plain = worlds["digits-mixed"], digits.load(SIZE, seed=2)
    for side, facts in zip(("train", "test"), known(world, "digits-mixed"), strict=True):
        got, want = getattr(world, side)[0], getattr(plain, side)[0]
        negative = torch.from_numpy(facts == "negative")
        assert int(negative.sum()) == len(facts) // 2
        assert torch.equal(got[~negative], want[~negative])
        torch.testing.assert_close(got[negative], 1 - want[negative])


@pytest.mark.parametrize("name", CASES)
def test_an_influence_finds_its_own_kind_and_chance_does_not(worlds, name):
    world = worlds[name]
    metric = default_registry().make("metric", CASES[name][1])

    def measured(scores):
        return metric.measure(dattri.Evidence(scores, None, world))

    method = dattri.method("if-kfac", damping=world.damping)
    found = measured(method.attribute(world.task, world.train, world.test, progress=False).values)
    assert found.low > found.chance
    noise = np.random.default_rng(0).normal(size=(300, 200))
    control = measured(noise)
    assert control.low < control.chance < control.high
