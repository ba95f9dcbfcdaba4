"""LiSSA with an EK-FAC as preconditioner: how near to the exact inverse a hundred steps come.

No goal was set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from making import MLP
from table import Table, Theme, seconds

pytestmark = pytest.mark.timeout(0)
THEME = Theme(
    "preconditioned_series",
    "LiSSA with a preconditioner",
    "MNIST network of 109,386 parameters, 1000 x 20, Gauss-Newton matrix, 100 steps of LiSSA. The "
    "preconditioner is EK-FAC of the same matrix at three times the damping. `off`: the length of "
    "the scores less those of `if-woodbury`, over the length of the latter. The scale counts "
    "eigenvalues of the samples, with a preconditioner in its units. Times are of the whole "
    "attribution; in so small a network the preconditioner costs more than a product.",
)
DEPTH = 100
QUERIES = 20


@pytest.mark.parametrize("batch", [32, 256, None])
@pytest.mark.parametrize("damping", [1e-2, 2e-3])
def test_preconditioned_series(
    benchmark: Any, worlds: Any, table: Table, tmp_path: Path, damping: float, batch: int | None
) -> None:
    """Plain, preconditioned and exact in one run."""
    path = worlds("mnist", MLP, 1000, 100)
    series = {"name": "lissa", "damping": damping, "batch": batch, "depth": DEPTH}
    near = {
        "curvature": {"name": "ekfac", "fisher": "ggn"},
        "solver": {"name": "spectral", "damping": 3 * damping},
    }

    def run(name: str, **inverse: Any) -> tuple[Any, Any]:
        scores = tmp_path / f"{name}.npy"
        method = {"source": "per-example", "inverse_hessian": {"curvature": "ggn", **inverse}}
        job = {"world": str(path), "method": method, "repeats": 1, "queries": QUERIES}
        found = processes.own({**job, "scores": str(scores)})
        return found, np.load(scores)

    _, exact = run("exact", solver={"name": "woodbury", "damping": damping})
    plain, far = run("plain", solver=series)
    helped = benchmark.pedantic(
        run, ("helped",), {"solver": series, "preconditioner": near}, rounds=1
    )
    sides = {"plain": (plain, far), "preconditioned": helped}
    cells: dict[str, Any] = {}
    for name, (found, scores) in sides.items():
        off = np.linalg.norm(scores - exact) / np.linalg.norm(exact)
        cells |= {
            f"{name}: off": f"{off:.3f}",
            f"{name}: scale": f"{found['solver'][0]['scale']:.3g}",
            f"{name}: time": seconds(found["seconds"]),
        }
        benchmark.extra_info[name] = off
    step = "the train set" if batch is None else f"{batch} examples"
    table.put(f"damping {damping:g}, {step} a step", **cells)
