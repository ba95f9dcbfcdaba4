"""What a check says of parts that fail: which law, in which world, at which line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve, field, frozen
from toy_row_parts import ToyFold, ToyProjector, ToyScorer
from toy_solver_parts import ToySolver
from toy_sources import ToySource
from toy_world_parts import ToyFisher, ToyGGN, ToyInverseHessian

import dattri_core as dattri
from dattri_core.discovery import Origin, Plugin
from dattri_core.laws import bench_of, cases, check, check_plugin, find, laws_of
from dattri_core.registry import Registry


def failed(kind, part):
    return {finding.law for finding in check(kind, part).failures}


# --- more parts that a law is there for ------------------------------------------------------
@frozen(eq=False)
class Changed:
    """A map or an inverse whose results are changed by a function."""

    inner: Any
    change: Any

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def map(self, rows):
        return self.change(self.inner.map(rows))

    def adjoint(self, rows):
        return self.change(self.inner.adjoint(rows))

    def apply(self, rows):
        return self.change(self.inner.apply(rows))

    def with_damping(self, damping):
        return evolve(self, inner=self.inner.with_damping(damping))


@frozen
class ChangedProjector(ToyProjector):
    change: Any = None

    def build(self, space, *, stream, device):
        return Changed(super().build(space, stream=stream, device=device), self.change)


@frozen
class ChangedSolver(ToySolver):
    change: Any = None

    def solve_for(self, operator, device):
        return Changed(super().solve_for(operator, device), self.change)


@frozen
class SameProjector(ToyProjector):
    """The matrices of one stream, whatever the stream."""

    def build(self, space, *, stream, device):
        return super().build(space, stream=dattri.RandomStream(0, "one"), device=device)


@frozen
class Remembers(ToyScorer):
    """Divides by the largest sum that it ever saw first."""

    seen: dict = field(factory=dict)

    def finish(self, total, train, test):
        largest = self.seen.setdefault("largest", float(total.abs().max()))
        return dattri.Scored(total / largest)


@frozen
class Squared(ToySolver):
    """H^2 of the trace of H in the place of H."""

    def solve_for(self, operator, device):
        matrix = operator.dense()
        square = matrix @ matrix
        other = evolve(operator, matrix=square * (matrix.trace() / square.trace()))
        return super().solve_for(other, device)


@frozen
class SquaredRows(ToyFisher):
    """Twice the mean of g g^T, and says that it is exact."""

    exact = True

    def fit(self, problem):
        operator = super().fit(problem)
        return evolve(operator, matrix=2 * operator.matrix)


@frozen
class Scaled(ToyInverseHessian):
    """Seven times the inverse."""

    def fit(self, problem):
        return Changed(super().fit(problem), lambda rows: rows.scale(torch.full((len(rows),), 7.0)))


@pytest.mark.parametrize(
    ("kind", "part", "law"),
    [
        ("projector", ChangedProjector(change=lambda r: r.to(dtype=torch.float64)), "float32-map"),
        ("projector", ChangedProjector(change=lambda r: r.to(dtype=torch.float32)), "float32-map"),
        ("projector", SameProjector(), "norms-are-kept"),
        ("solver", ChangedSolver(change=lambda r: evolve(r, aux=zeros(r))), "apply-is-of-the-row"),
        ("solver", ChangedSolver(change=lambda r: r.to(dtype=torch.float64)), "float32-apply"),
        ("solver", Squared(exact=False), "curvature-is-felt"),
        ("curvature", SquaredRows(), "operator-is-the-named-one"),
        ("inverse_hessian", Scaled(), "damping-wins"),
        ("scorer", Remembers(), "part-is-frozen"),
        ("fold", ToyFold("three"), "counts-are-alike"),
    ],
)
def test_a_fault_is_found(kind, part, law):
    found = failed(kind, part)
    assert any(name.startswith(law) for name in found), found


def zeros(rows):
    return {name: torch.zeros_like(numbers) for name, numbers in rows.aux.items()}


# --- methods ----------------------------------------------------------------------------------
@frozen
class Twice:
    """Rows times two, in the space that they are in."""

    gives = frozenset({"adjoint", "keeps-factors"})

    def out_space(self, space):
        return space

    def build(self, space, *, stream, device):
        return TwiceMap(space)


@frozen(eq=False)
class TwiceMap:
    out_space: Any
    blockwise = True

    def map(self, rows):
        return rows.scale(torch.full((len(rows),), 2.0, dtype=rows.dtype, device=rows.device))

    adjoint = map


def test_a_method_of_parts_without_a_name_has_no_spec():
    report = check("method", dattri.Method(scorer=ToyScorer()))
    assert report.ok, str(report)
    told = {finding.law: finding for finding in report.findings}
    assert told["a-method-is-its-spec"].status == "skipped"
    assert "not registered when it was written" in told["a-method-is-its-spec"].detail


def test_a_projector_that_keeps_the_space_is_no_identity():
    inverse = dattri.CurvatureInverse(ToyGGN(), ToySolver(damping=0.01))
    told = {}
    for projector in (Twice(), "identity"):
        method = dattri.Method(projector=projector, inverse_hessian=inverse)
        (law,) = (one for one in laws_of("method") if one.name == "removal-is-predicted")
        told[str(projector)] = find(law, bench_of("method", method))
    assert [one.status for one in told.values()] == ["skipped", "passed"]


# --- what is said -----------------------------------------------------------------------------
@frozen
class Boom(ToySource):
    def bind(self, task, checkpoint, sample):
        if isinstance(sample, dict):
            raise ValueError("boom")
        return super().bind(task, checkpoint, sample)


def test_an_exception_is_told_with_the_world_and_the_line():
    report = check("source", Boom())
    detail = {finding.law: finding.detail for finding in report.failures}["space-is-true"]
    assert detail.startswith("ValueError: boom (in the world 'language'; at test_findings.py:")
    assert detail.endswith("in bind)")


def half_broken():
    origin = Origin("half", "dattri-half")
    registry = Registry(origin)
    registry.part("scorer", "good", "toy_row_parts:ToyScorer")
    registry.part("scorer", "lost", "no_such_module:Scorer")
    return registry


def test_a_plugin_that_is_turned_off_has_not_failed():
    registry = half_broken()
    registry._plugins.append(
        Plugin(Origin("other", "dattri-half"), "other", "off", "turned off by DATTRI_PLUGINS")
    )
    reports = check_plugin("dattri-half", registry=registry)
    assert [(r.name, r.ok) for r in reports] == [("good", True), ("lost", False)]


def test_a_part_that_cannot_be_imported_fails_and_the_others_are_checked():
    reports = check_plugin("dattri-half", registry=half_broken())
    assert [(r.name, r.ok) for r in reports] == [("good", True), ("lost", False)]
    (finding,) = reports[1].failures
    assert "No module named 'no_such_module'" in finding.detail
    found = {case.name: case for case in cases("dattri-half", registry=half_broken())}
    assert found["lost"].run().status == "failed"
    assert found["good"].run().status == "passed"
