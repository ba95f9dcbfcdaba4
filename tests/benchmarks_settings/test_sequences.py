"""Settings of sequences: worlds of made-up tokens and of the real data, and that networks learn."""

import os
import warnings
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from dattri_benchmarks import (
    fetch,
    maestro_music_transformer,
    models,
    shakespeare_nano_gpt,
    wikitext2_gpt2,
)
from dattri_benchmarks.sequences import Scale, Sequences, SequenceSetting, choose
from dattri_parts.training import Recipe, random_subsets, retraining
from oracles.taped_device import pretend

import dattri_core as dattri
from dattri_core.errors import InputError

REAL = Path(os.environ.get("DATTRI_DATA", fetch.data_folder()))
RECIPE = Recipe(
    epochs=8,
    batch=10,
    learning_rate=1e-2,
    weight_decay=0.1,
    optimizer="adamw",
    warmup=4,
    clip=1.0,
    keep=(1, 4),
)
SETTINGS = {
    "shakespeare-nanogpt": ("tinyshakespeare", shakespeare_nano_gpt.setting),
    "wikitext2-gpt2": ("wikitext-2", wikitext2_gpt2.setting),
    "maestro-music-transformer": ("maestro", maestro_music_transformer.setting),
}
NETWORKS = {
    "nano_gpt": lambda: models.nano_gpt(5, 8, 1, 8, 2, bias=False, tied=True),
    "gpt2": lambda: models.gpt2(5, 8, 1, 8, 2),
    "music_transformer": lambda: models.music_transformer(5, 8, 1, 8, 8, 2),
}


def walks(scale, seed):
    """Return sequences in which each token is its forerunner plus one or two, modulo 5."""
    random = np.random.default_rng(seed)
    parts = [np.cumsum(random.integers(1, 3, (count, scale.length)), 1) % 5 for count in scale.size]
    ids = [
        tuple(f"{what}-{k}" for k in range(len(part)))
        for what, part in zip("ab", parts, strict=True)
    ]
    return Sequences(parts[0], parts[1], ids[0], ids[1], {"kind": "walks"})


def made_up(name):
    full = Scale((60, 20), 8, 5, name, NETWORKS[name], RECIPE)
    small = attrs.evolve(full, size=(30, 20), length=6)
    return SequenceSetting("made-up", "Walks", walks, full, small, damping=0.1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_learns(name):
    """The best guess is one of two tokens: log 2 a token, accuracy one half; chance is a fifth."""
    world = made_up(name).load()
    losses = []
    for checkpoint in world.trajectory.checkpoints:
        state = checkpoint.load(world.trajectory.model)
        model = NETWORKS[name]()
        model.load_state_dict(state, strict=False)  # a tied weight has one of its names
        with torch.no_grad():
            losses.append(dattri.causal_lm(model.eval(), world.test).mean().item() / 7)
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < np.log(5) - 0.3
    assert world.facts["test_accuracy"] > 0.4
    state = world.trajectory.checkpoints[-1].load(world.trajectory.model)
    measured = world.retraining.measure(state)["loss"]  # of one name of a tied weight
    whole = world.task.model.state_dict()  # of all its names
    assert np.array_equal(world.retraining.measure(whole)["loss"], measured)
    with pytest.raises(InputError, match="token"):
        tied = {"token.weight", "head.weight"}
        world.retraining.measure({k: v for k, v in whole.items() if k not in tied})
    assert measured.mean() / 7 == pytest.approx(losses[2], rel=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_world_can_be_retrained_and_attributed(name):
    world = made_up(name).load((30, 20), seed=1)
    assert isinstance(made_up(name), dattri.Setting)
    assert isinstance(world.retraining, dattri.Retraining)
    masks = random_subsets(30, 2, seed=0)
    whole = dattri.Counterfactual(np.ones(30, bool), 1)
    *halves, again = world.retraining.train([*masks, whole])
    final = world.task.model.state_dict()
    assert all(torch.equal(again[name], final[name]) for name in final)  # the world's own training
    outcomes = [world.retraining.measure(state)["loss"] for state in halves]
    assert outcomes[0].shape == (20,)
    assert not np.allclose(outcomes[0], outcomes[1])
    scores = dattri.attribute(world.task, world.train, world.test, method="grad-dot")
    assert np.isfinite(np.asarray(scores.values)).all()
    assert scores.values.shape == (30, 20)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_retraining_alone_is_that_of_the_world(name, monkeypatch):
    setting = made_up(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sizes = [None, (30, 25)]
    want = [setting.load(size, seed=1).retraining for size in sizes]
    monkeypatch.setattr(retraining.ModelRetraining, "run", pytest.fail)
    got = [setting.retraining(size, seed=1, wrong=None) for size in sizes]
    for one, other in zip(got, want, strict=True):
        assert one.fingerprint == other.fingerprint
        assert (one.threads, one.device, one.recorded) == (other.threads, other.device, False)


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_that_a_device_records_are_those_of_python(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = made_up(name).retraining((33, 20))  # the last batch is smaller
    whole = dattri.Counterfactual(np.ones(33, bool), 1)
    want = made.run(whole).states
    tapes = pretend(monkeypatch)
    got = attrs.evolve(made, recorded=True).run(whole).states
    (tape,) = tapes
    assert tape.replays == 8 * 3 - 3
    for one, other in zip(got, want, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_cuda_device_is_used_and_records_where_there_is_one(monkeypatch):
    setting = made_up("nano_gpt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = setting.retraining()
    world = setting.load()
    assert (world.facts["device"], world.facts["tf32"]) == ("cpu", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there = setting.retraining()
    assert (there.device.type, there.recorded, there.tf32) == ("cuda", True, False)
    assert (here.device.type, here.recorded) == ("cpu", False)
    assert attrs.evolve(setting, tf32=True).retraining().tf32


@pytest.mark.parametrize(("field", "value"), [("order", "shared"), ("length", "steps")])
def test_order_and_length_are_those_of_the_retraining(field, value):
    plain = made_up("nano_gpt")
    changed = attrs.evolve(plain, **{field: value})
    assert getattr(changed.retraining(), field) == value
    assert changed.retraining().fingerprint != plain.retraining().fingerprint


def test_outcomes_with_products_in_tf32_are_kept_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    setting = made_up("nano_gpt")
    rounded = attrs.evolve(setting, tf32=True)
    one, other = (each.retraining((30, 20)).fingerprint for each in (setting, rounded))
    assert one != other
    assert rounded.load((30, 20)).facts["tf32"] is False  # it says what happened: a CPU has none


@pytest.mark.cuda
@pytest.mark.parametrize("name", SETTINGS)
def test_a_cuda_device_records_the_steps_of_a_network(name):
    """By SGD: see `test_networks_that_are_trained_together_are_those_of_one_by_one`."""
    scale = SETTINGS[name][1].small
    recipe = Recipe(epochs=2, batch=20, learning_rate=0.1, clip=1.0)
    setting = made_up("nano_gpt")
    scale = attrs.evolve(scale, recipe=recipe, size=(90, 20))
    made = attrs.evolve(setting, full=scale, small=scale).retraining()
    whole = dattri.Counterfactual(np.ones(90, bool), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = made.run(whole).states[-1]
    want = attrs.evolve(made, recorded=False).run(whole).states[-1]
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_are_trained_together_are_those_of_one_by_one(name):
    """Also where a weight is tied: in the stack it is one.

    By SGD: AdamW takes a step of full length along a gradient that is 0 but for rounding, as that
    of the keys' bias is.
    """
    steps = Recipe(epochs=8, batch=10, learning_rate=0.1, momentum=0.9, clip=1.0)
    alone = attrs.evolve(made_up(name).load((30, 20)).retraining, recipe=steps)
    masks = random_subsets(30, 3, seed=0)
    together = attrs.evolve(alone, together=3)
    for one, other in zip(alone.train(masks), together.train(masks), strict=True):
        assert one.keys() == other.keys()
        assert max((one[k] - other[k]).abs().max() for k in one) < 1e-5


def test_outcomes_do_not_depend_on_how_many_are_measured_at_once(monkeypatch):
    """A sequence of many tokens has many outputs: few of them fit in a forward pass."""
    world = made_up("gpt2").load((30, 20))
    state = world.task.model.state_dict()
    sizes = []

    def measured(outputs):
        monkeypatch.setattr(retraining, "OUTPUTS", outputs)
        fresh = attrs.evolve(world.retraining)
        build, seen = fresh.build, []

        def watched():
            model = build()
            model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
            return model

        found = attrs.evolve(fresh, build=watched).measure(state)["loss"]
        sizes.append(max(seen))
        return found

    whole, pieces, single = (measured(outputs) for outputs in (2**22, 7 * 6 * 5, 1))
    assert sizes == [20, 7, 2]  # two are looked at to learn the shape of the outputs
    np.testing.assert_allclose(pieces, whole, rtol=1e-6)
    np.testing.assert_allclose(single, whole, rtol=1e-6)


def test_the_size_chooses_the_scale_and_the_seed_the_data():
    setting = made_up("nano_gpt")
    assert setting.sizes == {"full": (60, 20), "small": (30, 20)}
    small, larger = setting.load((30, 25)), setting.load((31, 25))
    assert (small.facts["length"], larger.facts["length"]) == (6, 8)
    assert small.train[0].shape == (30, 6)
    assert small.test[0].shape == (25, 6)
    assert small.facts["kind"] == "walks"
    assert small.train_ids[:2] == ("a-0", "a-1")
    other = setting.load((30, 25), seed=1)
    assert not torch.equal(other.train[0], small.train[0])
    assert other.retraining.fingerprint != small.retraining.fingerprint
    same = setting.load((30, 25), seed=0)
    assert same.retraining.fingerprint == small.retraining.fingerprint
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            same.task.model.state_dict().values(),
            small.task.model.state_dict().values(),
            strict=True,
        )
    )


def test_what_cannot_be_loaded_is_refused():
    setting = made_up("nano_gpt")
    for size in ((19, 20), (20, 19), (20,), 20):
        with pytest.raises(InputError, match="size"):
            setting.load(size)
    with pytest.raises(InputError, match="no class labels"):
        setting.load(wrong=0.1)
    assert setting.load((20, 20), wrong=0.0).true_labels is None
    with pytest.raises(InputError, match="11 test sequences, and there are 10"):
        choose(11, 10, 0, "test")


def test_chosen_sequences_are_distinct_and_other_ones_for_train_and_test():
    chosen = choose(50, 100, 3, "train")
    assert (np.diff(chosen) > 0).all()
    assert not np.array_equal(chosen, choose(50, 100, 3, "test"))
    assert not np.array_equal(chosen, choose(50, 100, 4, "train"))
    assert np.array_equal(choose(100, 100, 3, "train"), np.arange(100))


@pytest.mark.parametrize("name", SETTINGS)
def test_registered_settings(name):
    _, setting = SETTINGS[name]
    assert dattri.default_registry().resolve("setting", name) is setting
    assert setting.name == name
    sizes = {
        "shakespeare-nanogpt": (3921, 435),
        "wikitext2-gpt2": (4054, 476),
        "maestro-music-transformer": (5000, 178),
    }
    assert setting.sizes["full"] == sizes[name]
    for scale in (setting.full, setting.small):
        with torch.device("meta"):
            model = scale.build()
            logits = model(torch.zeros(1, scale.length, dtype=torch.long))
        assert logits.shape == (1, scale.length, scale.vocabulary)
        assert max(scale.recipe.keep) == scale.recipe.epochs


@pytest.mark.parametrize("name", SETTINGS)
def test_real_worlds(name, monkeypatch):
    """One epoch of the small network on the real data."""
    folder, setting = SETTINGS[name]
    if not any((REAL / folder).glob("*")):
        pytest.skip(f"no {folder}/ in the folder that DATTRI_DATA names")
    recipe = attrs.evolve(setting.small.recipe, epochs=1, keep=())
    quick = attrs.evolve(setting, small=attrs.evolve(setting.small, recipe=recipe))
    world = quick.load((20, 20))
    tokens = torch.cat([world.train[0], world.test[0]])
    assert tokens.shape == (40, setting.small.length)
    assert 0 <= int(tokens.min()) < int(tokens.max()) < setting.small.vocabulary
    assert len(set(world.train_ids)) == len(set(world.test_ids)) == 20
    assert world.train[0] is world.train[1]
    assert world.facts["parameters"] < 300_000


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("shakespeare-nanogpt", None),
        ("wikitext2-gpt2", None),
        pytest.param("maestro-music-transformer", (3000, 178), marks=pytest.mark.slow),
    ],
)
def test_real_sequences_at_the_full_scale(name, size):
    folder, setting = SETTINGS[name]
    if not any((REAL / folder).glob("*")):
        pytest.skip(f"no {folder}/ in the folder that DATTRI_DATA names")
    scale = attrs.evolve(setting.full, size=size or setting.full.size)
    data = setting.read(scale, 0)
    assert data.train.shape == (scale.size[0], scale.length)
    assert data.test.shape == (scale.size[1], scale.length)
    assert max(data.train.max(), data.test.max()) == scale.vocabulary - 1 or size
    assert len(set(data.train_ids) | set(data.test_ids)) == sum(scale.size)
