"""The same numbers as dattri on logistic regression on real MNIST, 1000 train x 100 test.

Set DATTRI_PEERS_PYTHON to a Python that has dattri, and DATTRI_DATA to a folder with mnist in it.
"""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from peer_runs import run_script
from torch import nn

import dattri_core as dattri
from dattri_core import Task

pytestmark = [pytest.mark.peers, pytest.mark.timeout(1800)]
DAMPING = 1e-2
RATES = [0.1, 0.05]
N, M = 1000, 100


def setting(name, meaning):
    value = os.environ.get(name)
    if not value:
        pytest.skip(f"{name} is not set; give {meaning}")
    return value


def read_idx(folder, stem):
    """Return an IDX file as an array, whether or not it is compressed."""
    (path,) = sorted(folder.rglob(f"{stem}*"))[:1]
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def mnist(part, count):
    folder = Path(setting("DATTRI_DATA", "the folder that holds mnist"), "mnist")
    images, labels = read_idx(folder, f"{part}-images"), read_idx(folder, f"{part}-labels")
    x = torch.as_tensor(images[:count].reshape(count, -1).astype(np.float32) / 255)
    return (x - 0.1307) / 0.3081, torch.as_tensor(labels[:count].astype(np.int64))


def train_model(train, steps):
    model = nn.Linear(784, 10)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return the data, two checkpoints, and the folder with dattri's scores of them."""
    folder = tmp_path_factory.mktemp("dattri")
    train, test = mnist("train", N), mnist("t10k", M)
    states = [train_model(train, steps) for steps in (60, 20)]
    np.savez(
        folder / "arrays.npz",
        weight=states[0]["weight"],
        bias=states[0]["bias"],
        weight_1=states[1]["weight"],
        bias_1=states[1]["bias"],
        train_x=train[0],
        train_y=train[1],
        test_x=test[0],
        test_y=test[1],
    )
    run_script("dattri_scores.py", folder, packages={"dattri": "dattri 0.3.0"})
    return train, test, states, folder


CASES = {
    "grad-dot": {},
    "grad-cos": {},
    "tracin": {},
    "if-explicit": {"damping": DAMPING},
    "if-cg": {"damping": DAMPING, "maximum_iterations": 200, "tolerance": 1e-6},
}


@pytest.mark.parametrize(
    ("method", "memory"),
    [
        *((method, "2GiB") for method in CASES),
        *((method, "64MiB") for method in CASES if not method.startswith("if")),
    ],
)
def test_scores_equal_those_of_dattri_given_one_full_batch(world, method, memory):
    train, test, states, folder = world
    task = Task(
        nn.Linear(784, 10),
        checkpoints=states if method == "tracin" else states[:1],
        learning_rates=RATES if method == "tracin" else None,
    )
    got = dattri.attribute(task, train, test, method=method, memory=memory, **CASES[method])
    want = torch.as_tensor(np.load(folder / f"{method}.npy"))
    assert got.shape == (N, M) == tuple(want.shape)
    difference = got.values.double() - want
    assert difference.norm() / want.norm() <= 1e-3
    assert difference.abs().max() <= 1e-3 * want.abs().max()
