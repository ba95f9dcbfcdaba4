"""Twenty dampings against one, 100 queries on the MNIST network.

Goals: at most 1.2 times the time for Arnoldi and the sketched Gauss-Newton matrix, 4 times for
EK-FAC.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import processes
import pytest
from making import MLP
from table import Table, Theme, mib, seconds

pytestmark = pytest.mark.timeout(0)
THEME = Theme(
    "sweep",
    "Sweeps of the damping",
    "MNIST network of 109,386 parameters, 1000 x 100. `sweep` of twenty dampings between 1e-4 and "
    "1 against `sweep` of one, both after the same fit; the best of three.",
)
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "if-arnoldi": ({"rank": 50, "iterations": 50}, 1.2),
    "logra": ({"rank": 64}, 1.2),
    "if-ekfac": ({}, 4.0),
}


@pytest.mark.parametrize("method", CASES)
def test_sweep(benchmark: Any, worlds: Any, table: Table, registered: Any, method: str) -> None:
    """Both in one run."""
    registered("method", method)
    overrides, goal = CASES[method]
    dampings = [float(x) for x in np.geomspace(1e-4, 1, 20)]
    job = {
        "world": str(worlds("mnist", MLP, 1000, 100)),
        "method": method,
        "overrides": overrides,
        "repeats": 3,
    }
    one = processes.own({**job, "dampings": dampings[:1]})
    twenty = benchmark.pedantic(processes.own, ({**job, "dampings": dampings},), rounds=1)
    ratio = twenty["score"] / one["score"]
    benchmark.extra_info["ratio"] = ratio
    table.put(
        method,
        **{
            "fit": seconds(twenty["fit"]),
            "1 damping": seconds(one["score"]),
            "20 dampings": seconds(twenty["score"]),
            "ratio": f"{ratio:.2f}",
            "goal": f"<= {goal}",
            "peak": mib(twenty["peak_mib"]),
            "met": ratio <= goal,
        },
    )
