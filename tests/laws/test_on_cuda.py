"""Every built-in part and method gives on CUDA what it gives on the CPU: one law of the suite."""

from __future__ import annotations

import pytest

import dattri_core as dattri
from dattri_core.laws import KINDS, laws_of
from dattri_core.laws.run import bench_of, find, part_of
from dattri_core.registry import default_registry

pytestmark = pytest.mark.cuda
LAW = "device-does-not-show"
CASES = [
    (entry.kind, entry.name)
    for entry in default_registry().entries()
    if entry.kind in KINDS
    and LAW in {law.name for law in laws_of(entry.kind)}
    and entry.name != "fast-jl"  # its matrix is that of one kind of GPU, and is on no CPU
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_device_does_not_show(kind: str, name: str) -> None:
    if name == "bm25":
        pytest.importorskip("bm25s")
    make, given = default_registry().make, name
    if (kind, name) == ("inverse_hessian", "composed"):  # made of parts that it has no default for
        given = dattri.CurvatureInverse(make("curvature", "ggn"), make("solver", "cholesky"))
    if (kind, name) == ("projector", "chain"):
        given = make("projector", "chain", parts=({"name": "mask", "dim": 7}, {"name": "sjlt"}))
    (law,) = (law for law in laws_of(kind) if law.name == LAW)
    found = find(law, bench_of(kind, part_of(kind, given)))
    assert found.status in ("passed", "skipped"), found
