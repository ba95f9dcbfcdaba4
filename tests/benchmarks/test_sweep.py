"""Twenty dampings against one, on the MNIST network and on a ResNet-9.

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
    "MNIST network of 109,386 parameters, 1000 x 100, and ResNet-9 of 4.8M on CIFAR-2, 500 x 50. "
    "`sweep` of twenty dampings between 1e-4 and 1 against `sweep` of one; the best of three, of "
    "ResNet-9 of one. `run`: with the fit that comes before either, which the goal is about; "
    "`scoring`: the sweeps alone. The passes over 1000 examples of the small network take as long "
    "as the scores at a damping or two: with LoGra of rank 64 those take 2.6e8 multiply-adds, a "
    "forward and a backward pass over all examples 3.6e8.",
)
SKETCHED = {
    "source": "per-example",
    "projector": {"name": "block-count-sketch", "dim": 2048},
    "inverse_hessian": {"curvature": "gauss-newton", "solver": "woodbury"},
}
CASES: dict[str, tuple[Any, dict[str, Any], float]] = {
    "if-arnoldi": ("if-arnoldi", {"rank": 50, "iterations": 50}, 1.2),
    "logra, rank 64": ("logra", {"rank": 64}, 1.2),
    "logra, rank 16": ("logra", {"rank": 16}, 1.2),
    "gauss-newton, block-count-sketch": (SKETCHED, {}, 1.2),
    "if-ekfac": ("if-ekfac", {}, 4.0),
}
WORLDS: dict[str, tuple[Any, ...]] = {
    "": ("mnist", MLP, 1000, 100),
    ", ResNet-9": ("cifar2", 500, 50),
}
LARGE = ("logra, rank 16", "gauss-newton, block-count-sketch")
"""Cases that are measured on the larger network, too."""


@pytest.mark.parametrize(
    ("case", "network"),
    [*((case, "") for case in CASES), *((case, ", ResNet-9") for case in LARGE)],
)
def test_sweep(
    benchmark: Any, worlds: Any, table: Table, registered: Any, case: str, network: str
) -> None:
    """Both in one run."""
    method, overrides, goal = CASES[case]
    if isinstance(method, str):
        registered("method", method)
    dampings = [float(x) for x in np.geomspace(1e-4, 1, 20)]
    job = {
        "world": str(worlds(*WORLDS[network])),
        "method": method,
        "overrides": overrides,
        "repeats": 1 if network else 3,
    }
    one = processes.own({**job, "dampings": dampings[:1]})
    twenty = benchmark.pedantic(processes.own, ({**job, "dampings": dampings},), rounds=1)
    run, scoring = (twenty[part] / one[part] for part in ("seconds", "score"))
    benchmark.extra_info.update(run=run, scoring=scoring)
    table.put(
        f"{case}{network}",
        **{
            "fit": seconds(one["fit"]),
            "1 damping": seconds(one["score"]),
            "20 dampings": seconds(twenty["score"]),
            "run": f"{run:.2f}",
            "goal": f"<= {goal}",
            "scoring": f"{scoring:.2f}",
            "peak": mib(twenty["peak_mib"]),
            "met": run <= goal,
        },
    )
