"""Representer points on MNIST against dattri's: time, and how well they add up to the prediction.

Goal: fifty times as fast as dattri with logistic regression on 1000 train and 100 test examples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import worlds as saved
from floors import best_of
from making import LR, MLP
from table import Table, Theme, mib, seconds

pytestmark = pytest.mark.timeout(0)
L2 = 3e-3
GOAL, LIMIT, PEER_LIMIT = 50, 600.0, 150.0
THEME = Theme(
    "rps_speed",
    "Representer points on MNIST, 1000 x 100",
    f"Logistic regression (LR) and a multi-layer perceptron (MLP), l2 = {L2}, of pixels between 0 "
    "and 1, or standardised, as MNIST mostly is. The layer is fitted again in float64 until the "
    "gradient is 1e-8 of that of the penalty; `gap` is the largest difference between an output on "
    "the train set and the sum of its representer values, relative to the largest output. dattri "
    f"is stopped after {PEER_LIMIT:.0f} s; it fits the layer to the model's own predictions, by "
    "gradient descent to a gradient 200 times smaller than at first or for its default of 3000 "
    "epochs: the first comes soon where pixels are between 0 and 1, since the model's own layer is "
    "where it begins. The floor is one product of the features with the layer and back, for each "
    "step of L-BFGS.",
)
NETWORKS: dict[str, tuple[Any, ...]] = {
    "LR": (LR, 1000, 100),
    "LR, standardised": (LR, 1000, 100, True),
    "MLP": (MLP, 1000, 100),
    "MLP, standardised": (MLP, 1000, 100, True),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_rps_speed(
    benchmark: Any, worlds: Any, table: Table, registered: Any, tmp_path: Path, network: str
) -> None:
    """Time, gap and dattri's time."""
    registered("method", "rps-l2")
    path = worlds("mnist", *NETWORKS[network])
    scores = str(tmp_path / "scores.npy")
    job = {
        "world": str(path),
        "method": "rps-l2",
        "overrides": {"l2": L2},
        "repeats": 2,
        "scores": scores,
    }
    own = benchmark.pedantic(processes.own, (job, LIMIT), rounds=1)
    assert own["finite"]
    (said,) = own["source"]
    floor = _floor(path, said["iterations"])
    cells: dict[str, Any] = {
        "time": seconds(own["seconds"]),
        "peak": mib(own["peak_mib"]),
        "steps": str(said["iterations"]),
        "gap": f"{said['representer_gap']:.1e}",
        "floor": seconds(floor),
        "of the floor": f"{own['seconds'] / floor:.1f}",
    }
    table.put(f"rps-l2, {network}", **cells, **_against(path, own["seconds"], tmp_path))


def _against(path: Path, own: float, folder: Path) -> dict[str, Any]:
    """Return what dattri takes, and whether the goal is met."""
    job = {"world": str(path), "l2": L2, "scores": str(folder / "theirs.npy")}
    try:
        found = processes.peer("peer_dattri_rps.py", job, PEER_LIMIT)
    except processes.UnfinishedError as error:
        least = PEER_LIMIT / own
        faster = f"more than {least:.0f}" if error.stopped else ""
        return {"dattri": str(error), "faster": faster, "fast": error.stopped and least >= GOAL}
    if found is None:
        return {"dattri": "not at hand", "faster": "", "fast": ""}
    assert np.load(folder / "theirs.npy").shape == (1000, 100)
    faster = found["seconds"] / own
    return {
        "dattri": seconds(found["seconds"]) + ("" if found["finite"] else ", not finite"),
        "faster": f"{faster:.0f}",
        "fast": faster >= GOAL,
    }


def _floor(path: Path, steps: int) -> float:
    """Return the time of the products with the features, in float64."""
    world = saved.load(path)
    features = world.model[:-1](world.train[0]).detach().double()
    layer = world.model[-1].weight.detach().double()
    return steps * best_of(lambda: (features @ layer.T).T @ features)
