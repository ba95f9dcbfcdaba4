"""`dvemb` against the same run without an example: same start, same batches, its weight zero."""

import numpy as np
import pytest
import torch
from dattri_benchmarks.digits import read_digits
from dattri_unroll import read_run
from oracles.unrolled import left_out
from recorded import run_recorded
from torch import nn

import dattri_core as dattri

TRAIN, TEST, EPOCHS, SIZE = 120, 10, 4, 20


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Return a network that is trained on digits, recorded, and what leaving each one out does."""
    images, labels = read_digits()
    x = torch.from_numpy(images.astype(np.float64) / 16).flatten(1)
    y = torch.from_numpy(labels.astype(np.int64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10)).double()
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(TRAIN, generator=generator) for _ in range(EPOCHS)]
    batches = [b.tolist() for b in torch.cat(orders).split(SIZE)]
    train, test = (x[:TRAIN], y[:TRAIN]), (x[TRAIN : TRAIN + TEST], y[TRAIN : TRAIN + TEST])
    world = model, "cross-entropy", train, test
    folder = tmp_path_factory.mktemp("run")
    run = run_recorded(world, folder, batches=batches, rates=[0.5] * len(batches), decay=1e-3)
    return world, dattri.Task(model, checkpoints=read_run(folder)), left_out(run, test)


def correlations(got, want):
    return np.array([np.corrcoef(got[:, j], want[:, j])[0, 1] for j in range(want.shape[1])])


@pytest.mark.parametrize(
    ("curvature", "least", "gap"),
    [("gauss-newton", 0.9, 0.55), ("ggn", 0.95, 0.35), ("hessian", 0.995, 0.1)],
)
def test_it_predicts_leaving_out_in_order_and_in_size(digits, curvature, least, gap):
    (_, _, train, test), task, want = digits
    method = dattri.method("dvemb", curvature=curvature)
    got = method.attribute(task, train, test, progress=False).removal_effect()
    assert correlations(got, want).mean() >= least
    assert (got - want).norm() <= gap * want.norm()


def test_the_last_weights_alone_do_not_predict_it(digits):
    (_, _, train, test), task, want = digits
    last = dattri.Task(task.model, checkpoints=[task.checkpoints[-1]])
    scores = dattri.attribute(last, train, test, method="grad-dot", progress=False)
    assert correlations(scores.values, want).mean() < 0.87
