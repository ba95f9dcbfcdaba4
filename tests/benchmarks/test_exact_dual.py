"""The exact influence of the Gauss-Newton matrix in the dual, against ten iterations of dattri.

Goal: faster than dattri's ten iterations of conjugate gradients on the same 1000 train examples.
"""

from __future__ import annotations

from typing import Any

import processes
import pytest
from making import MLP
from table import Table, Theme, mib, seconds

pytestmark = pytest.mark.timeout(0)
THEME = Theme(
    "woodbury",
    "The exact inverse in the dual",
    "MNIST network of 109,386 parameters, 1000 x 100, damping 0.01. Ours is exact, from inner "
    "products of the rows of the Gauss-Newton matrix (nine for each example) or of the empirical "
    "Fisher matrix (one); dattri 0.3.0 stops after ten iterations of conjugate gradients.",
)
CASES = {
    "Gauss-Newton": "ggn",
    "empirical Fisher": "gauss-newton",
}


@pytest.mark.parametrize("case", CASES)
def test_woodbury(benchmark: Any, worlds: Any, table: Table, registered: Any, case: str) -> None:
    """Both in one run."""
    registered("solver", "woodbury")
    curvature = CASES[case]
    registered("curvature", curvature)
    path = worlds("mnist", MLP, 1000, 100)
    inverse = {"curvature": curvature, "solver": {"name": "woodbury", "damping": 1e-2}}
    method = {"source": "per-example", "inverse_hessian": inverse}
    own = benchmark.pedantic(processes.own, ({"world": str(path), "method": method},), rounds=1)
    peer = processes.peer("peer_dattri.py", {"world": str(path), "method": "if-cg"})
    if peer is None:
        return
    faster = peer["seconds"] / own["seconds"]
    benchmark.extra_info["faster"] = faster
    table.put(
        case,
        **{
            "time": seconds(own["seconds"]),
            "peak": mib(own["peak_mib"]),
            "dattri's CG": seconds(peer["seconds"]),
            "its peak": mib(peer["peak_mib"]),
            "faster": f"{faster:.2f}",
            "goal": "> 1",
            "met": faster > 1,
        },
    )
