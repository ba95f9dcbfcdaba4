"""TRAK of traker, the authors' library, at the same features: no sketch, one checkpoint.

Set DATTRI_PEERS_PYTHON to a Python that has traker 0.3.2. It divides the inverse of the second
moment by the mean size of its entries, so that its scores are right up to one factor.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.toy_tasks import examples, mlp, states
from scipy.stats import spearmanr

import dattri_core as dattri
from dattri_core import Task

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).with_name("traker_scores.py")
SIZES, N, M, DAMPING = (6, 7, 4), 200, 30, 1e-2


def test_scores_have_the_ranks_of_traker(tmp_path):
    python = os.environ.get("DATTRI_PEERS_PYTHON")
    if not python:
        pytest.skip("DATTRI_PEERS_PYTHON is not set; give a Python that has traker 0.3.2")
    train, test = (
        examples(count, inputs=6, classes=4, seed=seed, dtype=torch.float32)
        for count, seed in ((N, 100), (M, 300))
    )
    (weights,) = states(1, sizes=SIZES, dtype=torch.float32)
    model = mlp(SIZES, dtype=torch.float32)
    numbers = sum(p.numel() for p in model.parameters())
    arrays = {f"0:{name}": w for name, w in weights.items()}
    sides = {"train_x": train[0], "train_y": train[1], "test_x": test[0], "test_y": test[1]}
    np.savez(tmp_path / "arrays.npz", **arrays, **sides)
    # It divides features by the root of their number and adds the ridge to a sum over n examples.
    ridge = N * DAMPING / numbers
    done = subprocess.run(
        [python, str(SCRIPT), str(tmp_path), str(ridge)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    if "No module named 'trak'" in done.stderr:
        pytest.skip("the Python of DATTRI_PEERS_PYTHON has no traker")
    assert done.returncode == 0, done.stderr[-3000:]
    method = dattri.method("trak", projector="identity", damping=DAMPING)
    got = method.attribute(Task(model, checkpoints=weights), train, test).values.double().numpy()
    want = np.load(tmp_path / "traker.npy")
    assert want.shape == (N, M)
    ranks = [spearmanr(got[:, j], want[:, j]).statistic for j in range(M)]
    assert min(ranks) >= 0.99
    factor = (got * want).sum() / (want * want).sum()
    assert factor > 0
    assert np.abs(got - factor * want).max() <= 5e-3 * np.abs(got).max()
