"""What every setting keeps to: the numbers depend on the arguments alone, and fit each other."""

import copy
import urllib.request

import attrs
import numpy as np
import pytest
import torch
from dattri_parts.measuring.attribution import task_of
from dattri_parts.training import ModelRetraining, Recipe
from oracles.models import check

import dattri_core as dattri
from dattri_core import (
    InputError,
    Setting,
    SpecError,
    World,
    causal_lm,
    cross_entropy,
    default_registry,
    take,
)
from dattri_core.laws import NotApplicable, bench_of, find, laws_of
from dattri_core.laws.settings import SIZE

NAMES = default_registry().names("setting")
QUICK = {"digits", "digits-parity", "digits-marked", "digits-mixed", "mnist-lr-sgd", "mnist-mlp"}
"""The others take more than their share of CI's time even at this size."""
TINY = SIZE
LOSSES = {"cross-entropy": cross_entropy, "causal-lm": causal_lm}


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in NAMES],
)
def load(request, tmp_path_factory):
    """Return a function that loads a world of the setting; nothing is downloaded or kept."""
    setting = default_registry().make("setting", request.param)
    bench = bench_of("setting", setting)

    def loaded(size=None, seed=1, wrong=None, again=False):
        return (bench.fresh if again else bench.loaded)(size, seed, wrong)

    loaded.setting, loaded.name, loaded.bench = setting, request.param, bench
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urllib.request, "urlopen", no_network)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        try:
            loaded()
        except NotApplicable as error:
            pytest.skip(str(error).split("(")[0])
        yield loaded


def no_network(url, timeout=None):
    raise OSError("tests download nothing")


@pytest.fixture
def untrained(monkeypatch):
    """Make any training an error."""

    def run(*args):
        raise AssertionError("a model was trained")

    monkeypatch.setattr(ModelRetraining, "run", run)


def tensors(data):
    return [data] if isinstance(data, torch.Tensor) else [t for part in data for t in tensors(part)]


def same(left, right):
    pairs = zip(tensors(left), tensors(right), strict=True)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def states(task):
    return [checkpoint.load(task.model) for checkpoint in task.checkpoints]


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max((left[k].double() - right[k].double()).abs().max().item() for k in left)


def has_classes(world):
    return world.true_labels is not None


@pytest.mark.parametrize("law", laws_of("setting"), ids=lambda law: law.name)
def test_law(load, law):
    finding = find(law, load.bench)
    if finding.status == "skipped":
        pytest.skip(finding.detail)
    assert finding.status == "passed", finding.detail


def test_the_world_says_what_it_is(load):
    world = load()
    assert isinstance(load.setting, Setting)
    assert isinstance(world, World)
    assert world.facts["data"] == load.setting.title
    assert len(world.facts["checkpoints"]) == len(world.trajectory.checkpoints) > 1


def test_the_retraining_alone_is_that_of_the_world(load, monkeypatch):
    make = getattr(load.setting, "retraining", None)
    if make is None:
        pytest.skip("the setting has its retraining by its world alone")
    shares = (None, 0.1) if has_classes(load()) else (None,)
    want = [load(wrong=wrong).retraining for wrong in shares]
    monkeypatch.setattr(ModelRetraining, "run", pytest.fail)
    got = [make(load.bench.size, seed=1, wrong=wrong) for wrong in shares]
    assert [one.fingerprint for one in got] == [one.fingerprint for one in want]


def test_pictures_are_grey_or_of_three_colours_and_use_their_range(load):
    for pictures in load().pictures or ():
        assert pictures.ndim == 3 or pictures.shape[3] == 3
        assert pictures.max() > 200


def test_exactly_the_wanted_share_of_train_labels_is_wrong(load):
    clean = load()
    if not has_classes(clean):
        pytest.skip(f"{load.name} has no classes")
    assert not clean.flipped.any()
    world = load(wrong=0.9)
    assert world.flipped.sum() == 36
    assert np.array_equal(world.true_labels, clean.true_labels)
    assert np.array_equal(world.train[-1].numpy() != clean.train[-1].numpy(), world.flipped)
    assert set(np.unique(world.train[-1])) <= set(range(load.setting.classes))
    assert same(world.train[:-1], clean.train[:-1])
    assert same(world.test, clean.test)
    assert world.facts["flipped"] == 36
    assert world.retraining.fingerprint != clean.retraining.fingerprint


def test_wrong_shares_are_refused_before_training(load, untrained):
    for wrong in (-0.1, 1.0, 1.5, float("nan"), "0.1"):
        with pytest.raises(InputError, match=f"{load.name}.*wrong"):
            load(wrong=wrong, again=True)


def test_sizes_that_cannot_be_are_refused_before_training(load, untrained):
    for size in ((10**7, 20), (40, 10**7), (0, 20), (40, -1), (40,), "many"):
        with pytest.raises(InputError):
            load(size=size, again=True)


def test_seeds_that_cannot_be_are_refused_before_training(load, untrained):
    for seed in (-1, 2**32, 0.5):
        with pytest.raises(InputError, match="seed"):
            load(seed=seed, again=True)


def test_the_run_step_by_step_passes_through_the_trajectory(load):
    world = load()
    if world.steps is None:
        with pytest.raises(SpecError, match="this setting does not give them"):
            task_of(dattri.method("dvemb"), world)
        return
    task = task_of(dattri.method("dvemb"), world)
    run = states(task)
    batches = [c.step.batch for c in task.checkpoints]
    per_epoch, epochs = -(-TINY[0] // len(batches[0])), world.facts["checkpoints"]
    assert len(run) == per_epoch * epochs[-1] + 1
    for epoch, state in list(zip(epochs, states(world.trajectory), strict=True))[:-1]:
        assert largest_difference(run[epoch * per_epoch], state) == 0
    seen = torch.cat(batches[:per_epoch]).sort().values
    assert torch.equal(seen, torch.arange(TINY[0]))
    scores = dattri.method("dvemb").attribute(task, world.train, world.test, progress=False)
    assert torch.isfinite(scores.values).all()  # every step that is looked at is one of descent
    assert float(scores.values.abs().max()) > 0


def test_outcomes_are_those_of_the_model(load):
    world = load()
    targets = world.retraining.targets
    assert world.target in targets
    assert targets["loss"] is False
    assert all(better for name, better in targets.items() if name != "loss")
    outcomes = world.retraining.measure(states(world.task)[0])
    assert set(outcomes) == set(targets)
    assert all(values.shape == (TINY[1],) for values in outcomes.values())
    with torch.no_grad():
        loss = world.task.loss(world.task.model, world.test)
    assert np.allclose(outcomes["loss"], loss.numpy(), rtol=1e-4, atol=1e-5)
    if has_classes(world):
        assert np.allclose(outcomes["loss"], np.logaddexp(0, -outcomes["margin"]))
        assert world.facts["test_accuracy"] == outcomes["correct"].mean()
        assert (outcomes["correct"] == (outcomes["margin"] > 0))[
            np.abs(outcomes["margin"]) > 3
        ].all()


def test_another_recipe_or_size_has_another_fingerprint(load):
    retraining = load().retraining
    recipe = retraining.recipe
    if isinstance(recipe, Recipe):
        changed = attrs.evolve(recipe, learning_rate=2 * recipe.learning_rate)
    else:
        changed = attrs.evolve(recipe, l2=2 * recipe.l2)
    assert attrs.evolve(retraining, recipe=recipe).fingerprint == retraining.fingerprint
    assert attrs.evolve(retraining, recipe=changed).fingerprint != retraining.fingerprint
    assert load(size=(40, 21)).retraining.fingerprint != retraining.fingerprint


def test_rows_are_gradients(load):
    world = load()
    model = world.task.model
    if sum(p.numel() for p in model.parameters()) > 200_000:
        pytest.skip(f"the network of {load.name} is too large; test_models has a small one")
    loss = LOSSES[world.task.loss_name]
    batch = take(world.train, slice(0, 5))
    double = tuple(t.double() if t.is_floating_point() else t for t in batch)
    check(copy.deepcopy(model).double(), loss, double)
