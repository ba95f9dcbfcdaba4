"""TRAK against dattri's on an ensemble: time, and the linear datamodelling score by retraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import retraining
import torch
import worlds as saved
from dattri_metrics.datamodels import lds
from floors import best_of
from making import MLP
from table import Table, Theme, mib, seconds

pytestmark = pytest.mark.timeout(0)
DIM, MEMBERS, HALVES = 2048, 10, 60
LIMIT = 3600.0
THEME = Theme(
    "trak",
    "TRAK on MNIST",
    f"A multi-layer perceptron (109,386 parameters), 5000 train and 500 test examples, {MEMBERS} "
    f"models trained on random halves, sketches of {DIM} numbers, float32. LDS: the linear "
    f"datamodelling score on {HALVES} other halves, with a 95 % interval over test examples "
    "and halves. Our damping is the default of the method, a tenth of the mean eigenvalue, which "
    "was chosen by this score on the digits data and not on MNIST; dattri gets a ridge of 1e-6, "
    "which nobody chose, batches of 500 and its projection of signs. The floor of a dense sketch "
    "is the product of all gradients, [5500, 109386], with a matrix of that size, at the machine's "
    "rate on a large product, once for each model.",
)
PROJECTORS = {"block-count-sketch": 5.0, "rademacher": None, "gaussian": None}


@pytest.mark.parametrize("projector", PROJECTORS)
def test_trak_speed(
    benchmark: Any, worlds: Any, table: Table, registered: Any, tmp_path: Path, projector: str
) -> None:
    """One of our sketches."""
    registered("method", "trak")
    world = worlds("mnist", MLP, 5000, 500)
    folder = retraining.ensemble(world, MEMBERS)
    job = {
        "world": str(world),
        "method": "trak",
        "overrides": {"projector": {"name": projector, "dim": DIM}},
        "checkpoints": str(folder),
        "scores": str(tmp_path / "scores.npy"),
    }
    own = benchmark.pedantic(processes.own, (job, LIMIT), rounds=1)
    cells = {"time": seconds(own["seconds"]), "peak": mib(own["peak_mib"])}
    cells |= _quality(world, np.load(tmp_path / "scores.npy"))
    floor = _floor(world)
    cells |= {"dense floor": seconds(floor), "of the floor": f"{own['seconds'] / floor:.2f}"}
    theirs = table.rows().get("dattri, rademacher")
    if theirs is not None:
        cells["faster than dattri"] = f"{float(theirs['seconds']) / own['seconds']:.1f}"
    table.put(f"ours, {projector}", **cells)


def test_trak_speed_of_dattri(benchmark: Any, worlds: Any, table: Table, tmp_path: Path) -> None:
    """The peer."""
    world = worlds("mnist", MLP, 5000, 500)
    folder = retraining.ensemble(world, MEMBERS)
    job = {
        "world": str(world),
        "checkpoints": str(folder),
        "dim": DIM,
        "projection": "rademacher",
        "batch": 500,
        "regularization": 1e-6,
        "scores": str(tmp_path / "scores.npy"),
    }
    found = benchmark.pedantic(processes.peer, ("peer_dattri_trak.py", job, LIMIT), rounds=1)
    if found is None:
        pytest.skip("DATTRI_PEERS_PYTHON names no Python that has dattri")
    cells = {"time": seconds(found["seconds"]), "seconds": found["seconds"]}
    table.put("dattri, rademacher", **cells, **_quality(world, np.load(tmp_path / "scores.npy")))


def _quality(world: Path, scores: np.ndarray) -> dict[str, str]:
    masks, margins = retraining.truth(world, HALVES)
    found = lds(scores, masks, margins, higher_is_better=True)
    return {"LDS": str(found)}


def _floor(world: Path) -> float:
    """Return the time of one dense product of each model's gradients with a matrix of signs."""
    held = saved.load(world)
    size = sum(p.numel() for p in held.model.parameters())
    rows, part = len(held.train[0]) + len(held.test[0]), 4096
    left, right = torch.randn(rows, part), torch.randn(part, DIM)
    return MEMBERS * size / part * best_of(lambda: left @ right)
