"""Similarity of features: cosine and minus L2, against numpy."""

import numpy as np
import pytest
import torch
from dattri_parts.scorers.negative_distance import NegativeDistance
from oracles.toy_tasks import examples, mlp
from scipy.spatial.distance import cdist
from torch import nn

import dattri_core as dattri
from dattri_core.laws import worlds

TRAIN, TEST = examples(13, seed=1), examples(5, seed=5)


def features(model, side):
    with torch.no_grad():
        return model[:-1](side[0]).numpy()


def values(name, **changes):
    scores = dattri.method(name, **changes).attribute(dattri.Task(mlp()), TRAIN, TEST)
    return scores.values.numpy()


def test_embedding_similarity_is_the_cosine_of_features():
    f, q = (features(mlp(), side) for side in (TRAIN, TEST))
    want = 1 - cdist(f, q, "cosine")
    assert np.abs(values("embedding-similarity") - want).max() < 1e-13


def test_embedding_distance_is_minus_the_distance_of_features():
    f, q = (features(mlp(), side) for side in (TRAIN, TEST))
    assert np.abs(values("embedding-distance") + cdist(f, q)).max() < 1e-13


@pytest.mark.parametrize("name", ["embedding-similarity", "embedding-distance"])
def test_sequences_need_no_label(name):
    world = worlds.language()
    task = world.task()
    scores = dattri.attribute(task, world.train, world.test, method=name, pooling="mean")
    last = [m for m in task.model.modules() if isinstance(m, nn.Linear)][-1]
    seen = []
    handle = last.register_forward_hook(lambda _, given, __: seen.append(given[0].mean(1)))
    with torch.no_grad():
        for side in (world.train, world.test):
            task.loss.forward(task.model, side)
    handle.remove()
    f, q = (part.numpy() for part in seen)
    want = 1 - cdist(f, q, "cosine") if name == "embedding-similarity" else -cdist(f, q)
    assert np.abs(scores.values.numpy() - want).max() < 1e-10


def test_any_source_gives_the_features():
    source = {"name": "representation", "inputs": True}
    got = values("embedding-distance", source=source)
    assert np.abs(got + cdist(TRAIN[0].numpy(), TEST[0].numpy())).max() < 1e-13


def test_the_target_changes_nothing():
    task = dattri.Task(mlp(), target="logit")
    got = dattri.attribute(task, TRAIN, TEST, method="embedding-distance", progress=False).values
    assert np.array_equal(got.numpy(), values("embedding-distance"))


def test_distances_add_up_over_blocks_and_of_equal_rows_are_zero():
    scorer = NegativeDistance()
    rows = 1e6 + torch.randn(4, 9, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    parts = [dattri.DenseBlock(rows[:, :4]), dattri.DenseBlock(rows[:, 4:])]
    total = sum(scorer.pair(part, part) for part in parts)
    got = scorer.finish(total, None, None).values
    assert (got.diagonal() == 0).all()
    want = cdist(rows.double().numpy(), rows.double().numpy())
    apart = ~np.eye(4, dtype=bool)
    assert np.abs(got.numpy() + want)[apart].max() < 2e-3 * want.max()
