"""Ensembles: members that do not know of each other, files that are whole, runs that go on."""

import math

import numpy as np
import pytest
import torch
from dattri_parts.training import random_subsets
from dattri_trak import train_ensemble
from safetensors.torch import load_file
from torch import nn

import dattri_core as dattri
from dattri_core import InputError, StoreError, Task

N = 40
INPUTS = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (N,), generator=torch.Generator().manual_seed(1))


class Recipe:
    """Trains a linear model by a few steps, and keeps what it was asked for."""

    def __init__(self, stop=None):
        self.asked = []
        self.stop = stop

    def __call__(self, indices, seed):
        if self.stop is not None and len(self.asked) == self.stop:
            raise KeyboardInterrupt
        self.asked.append((indices, seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Linear(5, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            outputs = model(INPUTS[indices])
            nn.functional.cross_entropy(outputs, LABELS[indices]).backward()
            optimizer.step()
        return model.state_dict()


def states(paths):
    return [load_file(path) for path in paths]


def equal(left, right):
    return all(torch.equal(left[name], right[name]) for name in left.keys() | right.keys())


def test_members_are_trained_on_their_subsets_by_their_seeds(tmp_path):
    recipe = Recipe()
    paths = train_ensemble(recipe, tmp_path / "e", n=N, members=3)
    assert [path.name for path in paths] == [f"member-0000{m}.safetensors" for m in range(3)]
    for subset, (indices, seed) in zip(random_subsets(N, 3), recipe.asked, strict=True):
        assert indices.tolist() == np.flatnonzero(subset.mask).tolist()
        assert seed == subset.seed
        assert len(indices) == N // 2 == len(set(indices.tolist()))
        assert torch.equal(indices, indices.sort().values)
    assert len({seed for _, seed in recipe.asked}) == 3
    assert all(0 <= seed < 2**32 for _, seed in recipe.asked)
    for path, (indices, seed) in zip(paths, recipe.asked, strict=True):
        assert equal(load_file(path), Recipe()(indices, seed))
    task = Task(nn.Linear(5, 3), checkpoints=tmp_path / "e")
    assert [c.name for c in task.checkpoints] == [path.name for path in paths]
    assert [c.name for c in Task(nn.Linear(5, 3), checkpoints=paths).checkpoints] == [
        path.name for path in paths
    ]


def test_a_member_does_not_depend_on_how_many_there_are(tmp_path):
    two, five = Recipe(), Recipe()
    few = states(train_ensemble(two, tmp_path / "two", n=N, members=2))
    many = states(train_ensemble(five, tmp_path / "five", n=N, members=5))
    assert all(equal(a, b) for a, b in zip(few, many[:2], strict=True))
    grown = Recipe()
    paths = train_ensemble(grown, tmp_path / "two", n=N, members=5)
    assert len(grown.asked) == 3
    assert all(equal(a, b) for a, b in zip(states(paths), many, strict=True))
    assert train_ensemble(Recipe(stop=0), tmp_path / "two", n=N, members=4) == paths[:4]


def test_a_stopped_run_goes_on_and_leaves_no_part_of_a_file(tmp_path):
    want = states(train_ensemble(Recipe(), tmp_path / "whole", n=N, members=4))
    with pytest.raises(KeyboardInterrupt):
        train_ensemble(Recipe(stop=2), tmp_path / "e", n=N, members=4)
    assert len(list((tmp_path / "e").iterdir())) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dattri_trak.ensemble.save", lambda state, metadata: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_ensemble(Recipe(), tmp_path / "e", n=N, members=4)
    assert len(list((tmp_path / "e").iterdir())) == 2
    rest = Recipe()
    paths = train_ensemble(rest, tmp_path / "e", n=N, members=4)
    assert len(rest.asked) == 2
    assert all(equal(a, b) for a, b in zip(states(paths), want, strict=True))


def test_all_data_with_independent_seeds(tmp_path):
    recipe = Recipe()
    paths = train_ensemble(recipe, tmp_path, n=N, members=2, fraction=1.0)
    assert all(torch.equal(indices, torch.arange(N)) for indices, _ in recipe.asked)
    first, second = states(paths)
    assert not equal(first, second)


def masks(seed):
    return torch.tensor(np.stack([s.mask for s in random_subsets(N, 400, seed=seed)])).float()


def test_subsets_are_independent_draws():
    """Of 400 subsets of half, an example is in half of them, a pair in just under a quarter."""
    inside = masks(0)
    assert (inside.sum(1) == N // 2).all()
    assert (inside.mean(0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(400)
    pairs = (inside.T @ inside / 400)[~torch.eye(N, dtype=torch.bool)]
    expected = 0.5 * (N / 2 - 1) / (N - 1)
    assert (pairs - expected).abs().max() < 5 * 0.44 / math.sqrt(400)
    both = float((inside * masks(1)).mean())
    assert abs(both - 0.25) < 5 * 0.5 / math.sqrt(400 * N)


def test_a_folder_of_other_settings_is_refused(tmp_path):
    train_ensemble(Recipe(), tmp_path, n=N, members=2)
    for changed in ({"seed": 1}, {"fraction": 0.25}, {"n": N + 2}):
        with pytest.raises(StoreError, match="it was made with"):
            train_ensemble(Recipe(stop=0), tmp_path, **{"n": N, "members": 2, **changed})
    (tmp_path / "member-00001.safetensors").write_bytes(b"torn")
    with pytest.raises(StoreError, match="delete this file"):
        train_ensemble(Recipe(stop=0), tmp_path, n=N, members=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, "members is 0"),
        ({"fraction": 0.0}, "fraction 0.0 of 40"),
        ({"fraction": 1.5}, "fraction 1.5 of 40"),
        ({"fraction": 0.001}, "keeps at least one"),
    ],
)
def test_settings_out_of_range_are_refused(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train_ensemble(Recipe(stop=0), tmp_path, **{"n": N, "members": 2, **options})


@pytest.mark.parametrize("state", [None, {}, {"weight": 1.0}, [torch.ones(1)]])
def test_a_recipe_that_returns_no_state_is_refused(state, tmp_path):
    with pytest.raises(InputError, match=r"return(ed)? .*state"):
        train_ensemble(lambda indices, seed: state, tmp_path, n=N, members=1)
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_are_kept_under_both_names(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    paths = train_ensemble(lambda indices, seed: model.state_dict(), tmp_path, n=4, members=1)
    assert set(load_file(paths[0])) == set(model.state_dict())
    Task(model, checkpoints=paths).checkpoints[0].check(model)


def test_trak_over_an_ensemble(tmp_path):
    train_ensemble(Recipe(), tmp_path, n=N, members=3)
    task = Task(nn.Linear(5, 3), checkpoints=tmp_path)
    scores = dattri.attribute(task, (INPUTS, LABELS), (INPUTS[:4], LABELS[:4]), "trak", dim=8)
    assert scores.shape == (N, 4)
    assert len(scores.provenance["checkpoints"]) == 3
