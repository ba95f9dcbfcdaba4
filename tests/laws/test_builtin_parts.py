"""Every built-in part and method meets every law of its kind."""

import attrs
import pytest

import dattri_core as dattri
from dattri_core.discovery import Origin, Plugin
from dattri_core.laws import KINDS, cases, check, check_plugin, laws_of
from dattri_core.laws.law import LAWS
from dattri_core.registry import Registry, default_registry

BUILT_IN = (
    "dattri_parts",
    "dattri_influence",
    "dattri_tracin",
    "dattri_grass",
    "dattri_trak",
    "dattri_rps",
    "dattri_knn",
    "dattri_baselines",
    "dattri_unroll",
    "dattri_retrain",
    "dattri_metrics",
)
CASES = [
    (entry.kind, entry.name)
    for entry in default_registry().entries()
    if entry.kind in (*KINDS, "attributor") and entry.origin.plugin in BUILT_IN
]


def test_the_built_ins_are_found():
    assert {("solver", "cg"), ("source", "per-example"), ("method", "if-explicit")} <= set(CASES)
    kinds = {*KINDS, "attributor"} - {"setting"}  # these train: tests/benchmarks_settings
    assert {kind for kind, _ in CASES} == kinds


# A recipe of an attributor is the attributor, and every step of a series is like the one before.
LONG = {
    *((kind, name) for kind, name in CASES if kind == "attributor" and ("method", name) in CASES),
    ("solver", "lissa"),
    ("method", "astra"),
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case in LONG)) for case in CASES],
)
def test_built_in(kind, name):
    if name == "bm25":
        pytest.importorskip("bm25s")
    part = name
    make = default_registry().make
    if (kind, name) == ("inverse_hessian", "composed"):  # made of parts that it has no default for
        part = dattri.CurvatureInverse(make("curvature", "ggn"), make("solver", "cholesky"))
    if (kind, name) == ("projector", "chain"):
        sketches = ({"name": "mask", "dim": 7}, {"name": "sjlt", "dim": 4})
        part = make("projector", "chain", parts=sketches)
    report = check(kind, part)
    assert report.ok, str(report)
    assert report.count("failed") == 0
    if kind == "method":
        status = {f.law: f.status for f in report.findings}
        exact = name in ("if-explicit", "if-cg", "if-woodbury")
        assert status["removal-is-predicted"] == ("passed" if exact else "skipped")


@pytest.mark.parametrize(
    ("kind", "name", "changes"),
    [
        ("source", "last-layer", {"target": 0, "l2": 0.1}),
        ("solver", "arnoldi", {"reduced": True}),
        ("solver", "arnoldi", {"complement": "keep"}),
        ("solver", "lissa", {"depth": 60}),
        ("solver", "lissa", {"batch": None}),
        ("solver", "lissa", {"repeats": 3, "depth": 200}),
        ("curvature", "diagonal", {"fisher": "ggn"}),
        ("curvature", "leading-ggn", {"columns": 2}),
        ("curvature", "leading-ggn", {"block": True}),
        ("curvature", "kfac", {"fisher": "ggn", "uncovered": "identity"}),
        ("curvature", "kfac", {"fisher": "empirical", "approximation": "reduce"}),
        ("curvature", "ekfac", {"draws": 2, "uncovered": "drop"}),
        ("curvature", "ekfac", {"fisher": "empirical"}),
        ("projector", "sjlt", {"dim": 6, "nonzeros": 3}),
        ("projector", "sjlt", {"dim": 3, "scope": "block"}),
        ("projector", "mask", {"dim": 7}),
        ("projector", "mask", {"dim": 3, "scope": "block"}),
        ("projector", "factor-mask", {"rank": 2, "uncovered": "sketch"}),
        ("projector", "factor-mask", {"rank_in": 2, "uncovered": "drop"}),
        ("projector", "grass", {"dim": 4, "mask_dim": 9}),
        ("projector", "grass", {"dim": 3, "mask_dim": 5, "scope": "block"}),
        ("projector", "factgrass", {"dim": 3, "mask_rank": 2}),
        ("projector", "factgrass", {"dim": 3, "mask_rank_in": 2, "uncovered": "sketch"}),
        ("projector", "factgrass", {"dim": 3, "mask_rank": 2, "uncovered": "drop"}),
    ],
)
def test_other_settings_of_built_ins(kind, name, changes):
    part = attrs.evolve(default_registry().make(kind, name), **changes)
    report = check(kind, part)
    assert report.ok, str(report)


def test_a_series_that_is_preconditioned_meets_the_laws_of_methods_after_two_steps():
    report = check("method", dattri.method("astra", batch=8, depth=2))
    assert report.ok, str(report)


@pytest.mark.parametrize("name", ["if-diagonal", "if-kfac", "if-ekfac"])
@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
def test_methods_that_draw_no_labels_ignore_the_order_of_the_train_set_too(name, fisher):
    report = check("method", dattri.method(name, fisher=fisher))
    assert report.ok, str(report)
    status = {f.law: f.status for f in report.findings}
    assert status["permuted-train-rows-permute-scores"] == "passed"


@pytest.mark.parametrize("block", [False, True])
def test_woodburys_inverse_of_the_train_rows_knows_them(block):
    make = default_registry().make
    moment = attrs.evolve(make("curvature", "gauss-newton"), block=block)
    part = dattri.CurvatureInverse(moment, make("solver", "woodbury"))
    report = check("inverse_hessian", part)
    assert report.ok, str(report)
    status = {f.law: f.status for f in report.findings}
    assert status["leverages-are-self-influences"] == "passed"


def test_a_plugin_is_checked_whole():
    reports = check_plugin("dattri_rps")
    assert [(r.kind, r.name) for r in reports] == [
        ("method", "rps-l2"),
        ("scorer", "representer"),
        ("source", "last-layer"),
    ]
    assert all(r.ok for r in reports)
    with pytest.raises(dattri.SpecError, match="did you mean 'dattri_tracin'"):
        check_plugin("dattri_trac")


def test_what_cannot_be_checked_is_said():
    with pytest.raises(dattri.SpecError, match="no laws for the kind 'command'"):
        check("command", "bench")
    with pytest.raises(dattri.SpecError, match="did you mean 'cosine'"):
        check("scorer", "cosin")
    with pytest.raises(dattri.SpecError, match=r"\['curvature', 'solver'\] have no default"):
        check("inverse_hessian", "composed")


@attrs.frozen
class Idle:
    """A source that can be bound to nothing."""

    provides = frozenset()

    def bind(self, task, checkpoint, sample):
        raise dattri.SpecError("it takes no module of this kind")


def test_a_report_that_ran_nothing_fails():
    report = check("source", Idle())
    assert (report.run, report.count("skipped")) == (0, len(laws_of("source")))
    assert not report.ok
    assert "nothing is shown" in str(report)
    assert "it takes no module of this kind" in str(report)


@attrs.frozen
class Excused:
    """A scorer that declares two laws as broken; it breaks one."""

    needs = frozenset()
    locality = "tile"
    expected_failures = {
        "an-example-helps-itself": "distances are turned",
        "tiles-are-their-own": "no reason",
    }

    def pair(self, train, test):
        return train.inner(test)

    def finish(self, total, train, test):
        return dattri.Scored(-total)


def test_expected_failures_cannot_outlive_their_cause():
    report = check("scorer", Excused())
    status = {f.law: f.status for f in report.findings}
    assert status["an-example-helps-itself"] == "expected"
    assert [f.law for f in report.failures] == ["tiles-are-their-own"]
    assert "declared to fail: no reason" in report.failures[0].detail
    assert "1 expected to fail, 1 failed" in report.summary


def test_every_law_states_itself_in_one_line():
    for laws in LAWS.values():
        for law in laws.values():
            text = (law.run.__doc__ or "").strip()
            assert text == law.statement, f"{law.kind} {law.name}"


def test_cases_are_the_laws_of_all_that_a_plugin_brings():
    found = cases("dattri_tracin")
    names = default_registry().entries()
    brought = {(e.kind, e.name) for e in names if e.origin.plugin == "dattri_tracin"}
    assert {(case.kind, case.name) for case in found} == brought
    for kind, name in brought:
        laws = [case.law for case in found if (case.kind, case.name) == (kind, name)]
        assert laws == list(laws_of(kind))
    assert len({str(case) for case in found}) == len(found)
    assert found[0].run().status in ("passed", "skipped")


def test_a_case_of_a_broken_plugin_says_what_broke_it():
    registry = Registry()
    registry._plugins.append(Plugin(Origin("lost"), "lost", "broken", "ImportError: no such"))
    with pytest.raises(dattri.PluginError, match=r"'lost': it is broken: ImportError: no such"):
        cases("lost", registry=registry)
