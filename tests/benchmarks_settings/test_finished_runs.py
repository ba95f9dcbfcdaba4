"""Runs that took long are kept and read back; the name of a file is all that it depends on."""

import attrs
import numpy as np
import pytest
import torch
from dattri_benchmarks import digits, finished_runs
from dattri_parts.training import ModelRetraining, Recipe

import dattri_core as dattri
from dattri_core.errors import StoreError
from dattri_core.laws import pretended

pretended.prepare()  # before any backward pass

SETTING = attrs.evolve(
    digits.setting, recipe=Recipe(epochs=3, batch=20, learning_rate=0.1, keep=(1, 3))
)
SIZE = (40, 20)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Every run counts as long."""
    monkeypatch.setattr(finished_runs, "LONG", -1.0)
    monkeypatch.setattr(finished_runs, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "trained"


@pytest.fixture
def trained(monkeypatch):
    """Counts what is trained."""
    run, calls = ModelRetraining.run, []

    def counted(self, *args):
        calls.append(args)
        return run(self, *args)

    monkeypatch.setattr(ModelRetraining, "run", counted)
    return calls


def states(world):
    return [dict(c.source) for c in world.trajectory.checkpoints]


def test_a_second_load_reads_what_the_first_trained(folder, trained):
    first = SETTING.load(SIZE, seed=5, wrong=0.1)
    second = SETTING.load(SIZE, seed=5, wrong=0.1)
    assert len(trained) == 1
    assert len(list(folder.iterdir())) == 1
    assert second.facts == first.facts
    assert second.facts["checkpoints"] == [1, 3]
    rates = [[c.learning_rate for c in w.trajectory.checkpoints] for w in (first, second)]
    assert rates[0] == rates[1]
    for left, right in zip(states(first), states(second), strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    for left, right in zip(
        first.task.model.parameters(), second.task.model.parameters(), strict=True
    ):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        (SETTING, {"seed": 6}),
        (SETTING, {"wrong": 0.2}),
        (attrs.evolve(SETTING, recipe=attrs.evolve(SETTING.recipe, keep=(2, 3))), {}),
        (attrs.evolve(SETTING, recipe=attrs.evolve(SETTING.recipe, momentum=0.5)), {}),
    ],
)
def test_anything_else_is_trained(folder, trained, setting, fields):
    SETTING.load(SIZE, seed=5)
    setting.load(SIZE, **{"seed": 5, **fields})
    assert len(trained) == 2
    assert len(list(folder.iterdir())) == 2


def test_a_short_run_is_not_kept(folder, trained, monkeypatch):
    monkeypatch.setattr(finished_runs, "LONG", 1e6)
    SETTING.load(SIZE)
    assert not folder.exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b"\x80\x04" + b])
def test_a_damaged_file_is_refused_by_name(folder, trained, damage):
    SETTING.load(SIZE)
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StoreError, match=rf"{path.name}.*delete it"):
        SETTING.load(SIZE)
    assert len(trained) == 1


def test_a_file_without_what_it_should_hold_is_refused(folder):
    from safetensors.torch import save_file

    SETTING.load(SIZE)
    (path,) = folder.iterdir()
    path.unlink()
    save_file({"0/1.weight": torch.zeros(1)}, path, {"run": '{"epochs": [3]}'})
    with pytest.raises(StoreError, match=r"foreign.*delete it"):
        SETTING.load(SIZE)


def test_what_cannot_be_kept_is_not_lost(folder, trained):
    folder.parent.mkdir(parents=True)
    folder.write_bytes(b"a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="not kept"):
        world = SETTING.load(SIZE)
    assert world.facts["parameters"] == 1810


def test_on_an_accelerator_short_runs_are_kept_too(tmp_path, monkeypatch, trained):
    """Trained again, a network would end at other last digits."""
    monkeypatch.setattr(finished_runs, "cache_folder", lambda: tmp_path)
    accelerator = pretended.accelerator()
    first = SETTING.load(SIZE, seed=6)
    assert not (tmp_path / "trained").exists()
    retraining = attrs.evolve(first.retraining, device=accelerator)
    whole = dattri.Counterfactual(np.ones(SIZE[0], dtype=bool), 6)
    runs = [finished_runs.finished_run(retraining, whole) for _ in range(2)]
    assert len(list((tmp_path / "trained").iterdir())) == 1
    assert len(trained) == 2  # that of the first world, and one
    for run in runs:
        for state in run.states:
            assert {tensor.device.type for tensor in state.values()} == {"cpu"}
    assert torch.equal(runs[0].train_correct, runs[1].train_correct)
    wanted = dict(first.trajectory.checkpoints[-1].source)
    for name, tensor in runs[1].states[-1].items():
        torch.testing.assert_close(tensor, wanted[name])
