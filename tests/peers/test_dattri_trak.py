"""TRAK of dattri at the same features: no sketch, two checkpoints, 200 train x 30 test.

Set DATTRI_PEERS_PYTHON to a Python that has dattri 0.3.0.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.toy_tasks import examples, mlp, states

import dattri_core as dattri
from dattri_core import Task

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).with_name("dattri_trak_scores.py")
SIZES, N, M, DAMPING = (6, 7, 4), 200, 30, 1e-2


def test_scores_over_n_equal_those_of_dattri(tmp_path):
    python = os.environ.get("DATTRI_PEERS_PYTHON")
    if not python:
        pytest.skip("DATTRI_PEERS_PYTHON is not set; give a Python that has dattri 0.3.0")
    train, test = (
        examples(count, inputs=6, classes=4, seed=seed, dtype=torch.float32)
        for count, seed in ((N, 100), (M, 300))
    )
    weights = states(2, sizes=SIZES, dtype=torch.float32)
    model = mlp(SIZES, dtype=torch.float32)
    numbers = sum(p.numel() for p in model.parameters())
    arrays = {f"{at}:{name}": w for at, state in enumerate(weights) for name, w in state.items()}
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
    assert done.returncode == 0, done.stderr[-3000:]
    method = dattri.method("trak", projector="identity", damping=DAMPING)
    got = method.attribute(Task(model, checkpoints=weights), train, test).values.double() / N
    want = torch.as_tensor(np.load(tmp_path / "trak.npy"))
    assert tuple(want.shape) == (N, M)
    assert (got - want).norm() <= 1e-3 * want.norm()
    assert (got - want).abs().max() <= 1e-3 * want.abs().max()
