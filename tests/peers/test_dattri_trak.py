"""TRAK of dattri at the same features: no sketch, two checkpoints, 200 train x 30 test.

Set DATTRI_PEERS_PYTHON to a Python that has dattri 0.3.0.
"""

import numpy as np
import pytest
import torch
from peer_runs import run_script, save_network

import dattri_core as dattri
from dattri_core import Task

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]
N, M, DAMPING = 200, 30, 1e-2


def test_scores_over_n_equal_those_of_dattri(tmp_path):
    model, weights, train, test = save_network(tmp_path, N, M, checkpoints=2)
    # It divides features by the root of their number and adds the ridge to a sum over n examples.
    ridge = N * DAMPING / sum(p.numel() for p in model.parameters())
    run_script("dattri_trak_scores.py", tmp_path, ridge, packages={"dattri": "dattri 0.3.0"})
    method = dattri.method("trak", projector="identity", damping=DAMPING)
    got = method.attribute(Task(model, checkpoints=weights), train, test).values.double() / N
    want = torch.as_tensor(np.load(tmp_path / "trak.npy"))
    assert tuple(want.shape) == (N, M)
    assert (got - want).norm() <= 1e-3 * want.norm()
    assert (got - want).abs().max() <= 1e-3 * want.abs().max()
