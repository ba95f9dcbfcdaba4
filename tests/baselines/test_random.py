"""Random scores: normal, and a pure function of (seed, train position, test position)."""

import dattri_baselines.random as module
import numpy as np
import pytest
import torch
from dattri_baselines.random import Random, normal
from scipy import stats
from torch import nn

from dattri_core.scores import Scores
from dattri_core.task import Task


@pytest.fixture(scope="module")
def task():
    return Task(nn.Linear(3, 2), "cross-entropy")


def data(n):
    return torch.zeros(n, 3), torch.zeros(n, dtype=torch.long)


def test_a_subset_has_the_numbers_of_the_whole(task):
    whole = Random(seed=4).attribute(task, data(30), data(20)).values
    part = Random(seed=4).attribute(task, data(11), data(7)).values
    assert torch.equal(part, whole[:11, :7])
    rows, columns = np.array([29, 3]), np.array([5, 19, 0])
    want = whole.numpy()[np.ix_(rows, columns)]
    assert np.array_equal(normal(4, rows, columns).astype(np.float32), want)


def test_the_size_of_the_work_does_not_show(task, monkeypatch):
    whole = Random().attribute(task, data(30), data(20)).values
    monkeypatch.setattr(module, "WORK", 41)
    assert torch.equal(Random().attribute(task, data(30), data(20)).values, whole)


def test_seeds_differ(task):
    one, two = (Random(seed).attribute(task, data(50), data(40)).values for seed in (0, 1))
    assert abs(np.corrcoef(one.flatten(), two.flatten())[0, 1]) < 0.1


def test_the_numbers_are_independent_standard_normals():
    z = normal(0, np.arange(1000), np.arange(300))
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    for other in (z[1:, :], z[:, 1:]):  # neighbours in either direction
        r = np.corrcoef(z[: other.shape[0], : other.shape[1]].ravel(), other.ravel())[0, 1]
        assert abs(r) < 5 / np.sqrt(other.size)
    assert stats.kstest(z.mean(0) * np.sqrt(1000), "norm").pvalue > 1e-3
    assert stats.kstest(z.mean(1) * np.sqrt(300), "norm").pvalue > 1e-3
    assert len(np.unique(z)) == z.size


def test_what_it_returns(task, tmp_path):
    scores = Random(seed=2).attribute(task, data(5), data(4), memory="1GiB", progress=False)
    assert scores.shape == (5, 4)
    assert scores.values.dtype == torch.float32
    assert scores.provenance["method"] == {"name": "random", "seed": 2}
    assert scores.provenance["target"] == {"name": "cross-entropy", "higher_is_better": False}
    stored = Random(seed=2).attribute(task, data(5), data(4), out=tmp_path / "s")
    assert np.array_equal(np.asarray(stored.values), scores.values.numpy())
    assert np.array_equal(np.asarray(Scores.load(tmp_path / "s").values), scores.values.numpy())


def test_a_dry_run_makes_nothing(task, tmp_path):
    text = str(Random().attribute(task, data(5), data(4), dry_run=True, out=tmp_path / "s"))
    assert "5 x 4" in text
    assert not (tmp_path / "s").exists()
