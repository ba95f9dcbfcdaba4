"""KNN-Shapley of dattri and of pyDVL, 200 train x 30 test, where they are right.

Set DATTRI_PEERS_PYTHON to a Python that has dattri 0.3.0 and pyDVL 0.10. Both give the farthest
row 1/n where its label is right, which is so for K up to n alone; for a larger K the values of
both add up to more than the utility of the whole train set.
"""

import numpy as np
import pytest
import torch
from oracles.toy_tasks import examples
from peer_runs import run_script, save_sides
from torch import nn

import dattri_core as dattri
from dattri_core import Task

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]
N, M = 200, 30
RIGHT, BEYOND = (1, 5, 200), 300


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return, for each K, our scores, those of dattri and the values of pyDVL."""
    folder = tmp_path_factory.mktemp("knn")
    train, test = (
        examples(count, inputs=6, classes=4, seed=seed, dtype=torch.float32)
        for count, seed in ((N, 100), (M, 300))
    )
    save_sides(folder, train, test)
    packages = {"dattri": "dattri 0.3.0", "pydvl": "pyDVL 0.10"}
    run_script("knn_scores.py", folder, *RIGHT, BEYOND, packages=packages)
    task = Task(nn.Linear(6, 4))
    utility = (train[1][:, None] == test[1]).double().sum(0) / BEYOND
    return utility.numpy(), {
        k: (
            dattri.attribute(task, train, test, "knn-shapley", inputs=True, neighbours=k)
            .values.double()
            .numpy(),
            np.load(folder / f"dattri_{k}.npy"),
            np.load(folder / f"pydvl_{k}.npy"),
        )
        for k in (*RIGHT, BEYOND)
    }


@pytest.mark.parametrize("neighbours", RIGHT)
def test_scores_equal_those_of_dattri_and_pydvl(found, neighbours):
    own, dattri_scores, pydvl_values = found[1][neighbours]
    assert own.shape == dattri_scores.shape == (N, M)
    assert np.abs(own - dattri_scores).max() <= 1e-6  # its sums are in float32
    assert np.abs(own.mean(1) - pydvl_values).max() <= 1e-7  # ours is stored in float32


def test_values_add_up_to_the_utility_for_more_neighbours_than_rows_and_theirs_do_not(found):
    utility, scores = found
    own, dattri_scores, pydvl_values = scores[BEYOND]
    assert np.abs(own.sum(0) - utility).max() <= 1e-6
    assert np.abs(dattri_scores.sum(0) - utility).max() >= 0.1
    assert abs(pydvl_values.sum() - utility.mean()) >= 0.1
