"""Inverses by many steps are checked with few of them, and with all where that is not enough."""

import attrs
from toy_deep_parts import ToyDeep

import dattri_core as dattri
from dattri_core.laws import bench_of, check
from dattri_core.laws.inverses import STEPS, shortened
from dattri_core.registry import default_registry


def test_a_law_that_needs_all_steps_is_given_them():
    assert check("inverse_hessian", ToyDeep("bend")).ok


def test_a_part_without_more_steps_than_few_is_judged_by_them():
    report = check("inverse_hessian", ToyDeep("bend", depth=STEPS))
    assert "inverse-is-linear" in {finding.law for finding in report.failures}


def test_what_all_steps_alone_break_shows_in_the_stats():
    report = check("inverse_hessian", ToyDeep("stats", deep=True))
    assert {finding.law for finding in report.failures} == {"stats-are-finite"}


def test_a_solver_inside_is_shortened_and_the_part_left_alone():
    make = default_registry().make
    part = dattri.CurvatureInverse(make("curvature", "ggn"), make("solver", "lissa"))
    bench = bench_of("inverse_hessian", part)
    assert bench.brief.solver == attrs.evolve(part.solver, depth=STEPS)
    assert bench.longer.brief is part
    assert bench.longer.longer is None
    exact = dattri.CurvatureInverse(make("curvature", "ggn"), make("solver", "cholesky"))
    assert shortened(exact) is exact
