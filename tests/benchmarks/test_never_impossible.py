"""Every influence method on three networks, each within a budget of memory.

A cell is a process with a time limit, DATTRI_BENCH_LIMIT seconds. Cells that the table holds are
not measured again; one that was stopped is, under a longer limit, and one that failed. Delete a row
of the JSON file to measure it anew.
"""

from __future__ import annotations

import os
from typing import Any

import family
import processes
import pytest
from making import MLP
from table import Table, Theme, mib, seconds

pytestmark = pytest.mark.timeout(0)
THEME = Theme(
    "never_impossible",
    "Every influence method on every network",
    "MLP: MNIST, 109,386 parameters, 5000 x 500. ResNet-9: CIFAR-2, 4,825,154 parameters, 500 x "
    "50. Transformer: 6 layers of width 384 on 200 x 20 sequences of 64 characters of "
    "Shakespeare, 10,722,048 parameters. Each method at its own defaults but for the settings "
    "named; each in a process of its own, with the memory budget that is given, as a user gives "
    "it, and measured against it: the peak is above what imports take. Where `settings` name "
    "parameters, those blocks are attributed and no others. `choice`: what the method or the "
    "planner says of the way it takes.",
)
LIMIT = float(os.environ.get("DATTRI_BENCH_LIMIT", "3600"))
NETWORKS: dict[str, tuple[tuple[Any, ...], str]] = {
    "MLP": (("mnist", MLP, 5000, 500), "2GiB"),
    "ResNet-9": (("cifar2", 500, 50), "4GiB"),
    "transformer": (("shakespeare", 200, 20), "4GiB"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "if-cg": {"curvature": "ggn", "maximum_iterations": 10, "tolerance": 0.0, "damping": 1e-2},
    "if-lissa": {"curvature": "ggn", "depth": 100, "damping": 1e-2},
    "if-arnoldi": {"curvature": "ggn", "rank": 20, "iterations": 40},
    "MLP, if-woodbury": {"curvature": "gauss-newton"},
    "transformer, if-woodbury": {"curvature": "gauss-newton"},
    "ResNet-9, relatif-explicit": {"curvature": "gauss-newton"},
    "transformer, if-arnoldi": {"curvature": "ggn", "rank": 16, "iterations": 30},
    "ResNet-9, if-lissa": {"curvature": "ggn", "depth": 100, "batch": 4, "damping": 1e-2},
    "transformer, if-lissa": {"curvature": "ggn", "depth": 100, "batch": 4, "damping": 1e-2},
}
"""Ten iterations, a hundred steps, a small Krylov space: minutes to hours of products on two cores.
The Gauss-Newton matrix, since networks that are trained briefly have negative Hessian eigenvalues.
In the dual it has a row for every example and class, or character and class; `gauss-newton` is the
second moment of the gradients, a row for every example, whose inverse knows each one's
self-influence.
"""
SUBSETS = {
    "ResNet-9, if-cg": ["5.shortcut.*", "8.*"],
    "transformer, if-cg": ["blocks.5.*", "norm.*", "head.*"],
}
"""Blocks that are attributed, named, where ten products of every query would take hours: the last
shortcut and the head, 133,122 of 4.8M parameters (with the whole last residual block, 3.7M, half of
the queries took 45 minutes); the last of six blocks and the head, 1.8M.
"""


@pytest.mark.parametrize("method", family.all_names())
@pytest.mark.parametrize("network", NETWORKS)
def test_never_impossible(
    benchmark: Any, worlds: Any, table: Table, registered: Any, network: str, method: str
) -> None:
    """Time, peak and choice of one cell."""
    registered("method", method)
    sizes, budget = NETWORKS[network]
    key = f"{network}, {method}"
    before = table.rows().get(key)
    if before is not None and (before["done"] or before["limit"] >= LIMIT):
        pytest.skip(f"measured before: {before}")
    overrides = SETTINGS.get(key, SETTINGS.get(method, {}))
    job = {
        "world": str(worlds(*sizes)),
        "method": method,
        "overrides": overrides,
        "memory": budget,
        "split": True,
        "parameters": SUBSETS.get(key, "*"),
    }
    said = ", ".join(f"{name}={value}" for name, value in overrides.items())
    if key in SUBSETS:
        said += f", parameters={SUBSETS[key]}"
    cells: dict[str, Any] = {"settings": said, "budget": budget}
    empty = {"time": "", "fit": "", "score": "", "peak": "", "within": "", "choice": ""}
    try:
        own = benchmark.pedantic(processes.own, (job, LIMIT), rounds=1)
    except processes.UnfinishedError as error:
        tried = LIMIT if error.stopped else 0.0
        table.put(key, **cells, **empty | {"time": str(error)}, done=False, limit=tried)
        raise
    within = own["peak_mib"] <= 1024 * float(budget.removesuffix("GiB"))
    cells |= {
        "time": seconds(own["seconds"]),
        "fit": seconds(own["fit"]),
        "score": seconds(own["score"]),
        "peak": mib(own["peak_mib"]),
        "within": within,
        "choice": _choice(own),
    }
    table.put(key, **cells, done=own["finite"], limit=LIMIT)
    assert own["finite"]


def _choice(own: Any) -> str:
    stats = own["solver"][0] if own["solver"] else {}
    told = [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in stats.items()
        if name not in ("checkpoint", "group")
    ]
    return "; ".join([own["choice"], *told])
