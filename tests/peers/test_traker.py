"""TRAK of traker, the authors' library, at the same features: no sketch, one checkpoint.

Set DATTRI_PEERS_PYTHON to a Python that has traker 0.3.2. It divides the inverse of the second
moment by the mean size of its entries, so that its scores are right up to one factor.
"""

import numpy as np
import pytest
from peer_runs import run_script, save_network
from scipy.stats import spearmanr

import dattri_core as dattri
from dattri_core import Task

pytestmark = [pytest.mark.peers, pytest.mark.timeout(600)]
N, M, DAMPING = 200, 30, 1e-2


def test_scores_have_the_ranks_of_traker(tmp_path):
    model, weights, train, test = save_network(tmp_path, N, M, checkpoints=1)
    # It divides features by the root of their number and adds the ridge to a sum over n examples.
    ridge = N * DAMPING / sum(p.numel() for p in model.parameters())
    run_script("traker_scores.py", tmp_path, ridge, packages={"trak": "traker 0.3.2"})
    method = dattri.method("trak", projector="identity", damping=DAMPING)
    got = method.attribute(Task(model, checkpoints=weights), train, test).values.double().numpy()
    want = np.load(tmp_path / "traker.npy")
    assert want.shape == (N, M)
    ranks = [spearmanr(got[:, j], want[:, j]).statistic for j in range(M)]
    assert min(ranks) >= 0.99
    factor = (got * want).sum() / (want * want).sum()
    assert factor > 0
    assert np.abs(got - factor * want).max() <= 5e-3 * np.abs(got).max()
