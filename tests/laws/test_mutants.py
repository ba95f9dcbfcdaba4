"""Broken parts, one a law: each breaks that law, and no other unless the table says so."""

import pytest
from toy_constant_parts import ToyConstant, ToyConstantInverse
from toy_experiment_parts import ToyDetection, ToyRemoval, ToySetting
from toy_loose import loose
from toy_moment_parts import ToyMoment, ToySquares, ToySummed
from toy_retrained import ToyDrawn
from toy_row_parts import (
    ForgetfulScorer,
    ToyAttributor,
    ToyDataProjector,
    ToyFitting,
    ToyFlatProjector,
    ToyFold,
    ToyProjector,
    ToyScorer,
)
from toy_solver_parts import ToyRootSolver, ToySolver, ToySpectralSolver
from toy_sources import (
    ToyDataSource,
    ToyEnsemble,
    ToyFeatures,
    ToyMargin,
    ToySided,
    ToySource,
)
from toy_world_parts import ToyFisher, ToyGGN, ToyInverseHessian, ToySpectrum

import dattri_core as dattri
from dattri_core.laws import KINDS, bench_of, check, find, laws_of
from dattri_core.registry import Registry, using

PLAIN = dattri.Method()


def inverting(**changes):
    parts = {"curvature": ToyGGN(), "solver": ToySolver(**changes)}
    return {"inverse_hessian": dattri.CurvatureInverse(**parts)}


def registry():
    """Return the installed parts and the toys, so that toys have specs."""
    made = Registry.discovered()
    made.part("source", "toy", "toy_sources:ToySource")
    made.part("curvature", "toy", "toy_world_parts:ToyGGN")
    made.part("solver", "toy", "toy_solver_parts:ToySolver")
    made.part("scorer", "toy", "toy_row_parts:ToyScorer")
    made.part("scorer", "forgetful", "toy_row_parts:ForgetfulScorer")
    return made


GOOD = {
    "source": [
        ToySource(),
        ToyMargin(),
        ToyEnsemble(),
        ToyDataSource(),
        ToyFeatures(),
        ToySided(),
    ],
    "projector": [ToyProjector(), ToyDataProjector(), ToyFlatProjector()],
    "curvature": [
        ToyGGN(),
        ToyFisher(),
        ToySpectrum(),
        ToySquares(),
        ToyMoment(),
        ToyMoment(blockwise=True),
        ToySummed(),
        ToyConstant("layers"),
    ],
    "solver": [
        ToySolver(),
        ToySolver(reduced=True),
        ToySolver(exact=False, blockwise=True),
        ToyRootSolver(),
        ToySpectralSolver(),
    ],
    "inverse_hessian": [
        ToyInverseHessian(),
        ToyInverseHessian(blockwise=True),
        ToyInverseHessian(two_sided=True),
        ToyInverseHessian(split=True),
        ToyInverseHessian(knowing=True),
        ToyInverseHessian(exact=True),
        ToyConstantInverse("layers"),
    ],
    "scorer": [
        ToyScorer(),
        ToyScorer(form="self-influence"),
        ToyScorer(form="inverse-norm"),
        ToyScorer(weighs=True),
    ],
    "fold": [ToyFold(), ToyFold(weighted=True), ToyFold(rated=True)],
    "method": [
        PLAIN,
        ToyAttributor(PLAIN),
        ToyDrawn(),
        ToyFitting(PLAIN),
        lambda: dattri.Method(scorer=ToyScorer(), **inverting()),
    ],
    "setting": [ToySetting(), ToySetting(alone=True), ToySetting(classes=False)],
    "metric": [
        ToyDetection(),
        ToyDetection(fact=True),
        ToyDetection(drawn=True),
        ToyRemoval(),
    ],
}

# kind -> law -> a part that breaks it. A function makes the part when the test runs.
BROKEN = {
    "source": {
        "part-is-frozen": loose(ToySource),
        "sample-does-not-show": ToyFeatures("centred"),
        "both-sides-are-one-source": ToyFeatures("one role"),
        "sides-that-differ-show": ToySided("alike"),
        "rows-are-plain-numbers": ToySource("graph"),
        "padding-does-not-show": ToyFeatures("length"),
        "space-is-true": ToySource("twice"),
        "aux-is-declared": ToySource("aux"),
        "rows-are-their-own": ToySource("centre"),
        "rows-are-repeatable": ToySource("noise"),
        "rows-are-gradients": ToySource("half"),
        "residual-times-row-is-the-loss-row": ToyMargin("residual"),
        "target-rows-carry-the-sign": ToySource("sign"),
        "rows-scale-with-the-loss": ToySource("clip"),
        "rows-cover-the-selection": ToySource("everything"),
        "pull-of-the-slope-is-the-loss-row": ToySource("pull scale"),
        "pull-is-linear": ToySource("pull bend"),
        "pull-is-of-single-rows": ToySource("pull place"),
        "rows-are-at-the-checkpoint": ToySource("live"),
        "moved-rows-are-bound-rows": ToySource("stays"),
        "reopened-rows-are-bound-rows": ToySource("reopened"),
        "members-are-networks-of-their-own": ToyEnsemble("same"),
        "a-fit-is-of-the-whole-train-set": ToyDataSource("first"),
        "device-does-not-show": ToySource("device"),
        "float32-rows-are-close": ToySource("coarse"),
        "model-is-untouched": ToySource("eval"),
    },
    "projector": {
        "part-is-frozen": loose(ToyProjector),
        "out-space-is-true": ToyProjector("space"),
        "inputs-are-untouched": ToyProjector("in place"),
        "norms-are-kept-in-the-mean": ToyFlatProjector("large"),
        "out-space-is-pure": ToyProjector("impure"),
        "map-is-linear": ToyProjector("bend"),
        "map-is-of-single-rows": ToyProjector("count"),
        "map-is-of-the-row": ToyProjector("formed"),
        "map-keeps-index-and-aux": ToyProjector("index"),
        "map-is-of-its-stream": ToyProjector("global"),
        "fit-is-of-the-train-set": ToyDataProjector("first"),
        "device-does-not-show": ToyProjector("device"),
        "float32-map-is-close": ToyProjector("coarse"),
        "adjoint-is-true": ToyProjector("adjoint"),
        "factors-are-kept": ToyProjector("forms"),
        "blockwise-is-true": ToyProjector("leak"),
        "additive-is-true": ToyFlatProjector("place"),
    },
    "curvature": {
        "part-is-frozen": loose(ToyGGN),
        "gives-is-pure": ToyGGN("gives"),
        "inputs-are-untouched": ToyFisher("in place"),
        "float32-operator-is-close": ToyFisher("wide"),
        "operator-is-symmetric": ToyFisher("skew"),
        "operator-is-the-named-one": ToyGGN("double"),
        "operator-is-a-mean": ToyFisher("sum"),
        "operator-ignores-order": ToyFisher("positions"),
        "operator-ignores-batches": ToyFisher("batches"),
        "operator-is-linear": ToyGGN("absolute"),
        "apply-is-of-single-rows": ToyGGN("alone"),
        "dense-is-apply": ToyGGN("dense"),
        "samples-are-means": ToyGGN("once"),
        "each-is-a-sample-of-one": ToyGGN("each"),
        "rows-are-of-the-operator": ToyMoment("weight"),
        "spectrum-is-of-the-operator": ToySpectrum("eigenvalues"),
        "device-does-not-show": ToyGGN("device"),
        "fit-is-repeatable": ToyFisher("noise"),
        "operator-is-positive": ToyFisher("shift"),
        "units-are-kept": ToyFisher("unit"),
        "examples-without-gradient-count": ToySquares("means"),
        "kept-fit-is-the-fit": ToyFisher("kept"),
        "parts-add-up": ToySummed("means"),
        "operator-is-of-the-train-set": ToyConstant("trace"),
    },
    "solver": {
        "part-is-frozen": loose(ToySolver),
        "inverse-is-exact": ToySolver(fault="shift"),
        "inputs-are-untouched": ToySolver(fault="in place"),
        "curvature-is-felt": ToySolver(fault="mean", exact=False),
        "null-space-is-damped": ToySolver(fault="range"),
        "saddle-is-not-hidden": ToySolver(fault="clip"),
        "inverse-is-linear": ToySolver(fault="bend", exact=False),
        "inverse-is-symmetric": ToySolver(fault="skew", exact=False),
        "apply-is-of-single-rows": ToySolver(fault="alone"),
        "apply-is-of-the-row": ToySolver(fault="formed"),
        "reduced-sides-are-true": ToySolver(fault="sides", reduced=True),
        "blockwise-is-true": ToySolver(fault="leak", exact=False, blockwise=True),
        "split-is-true": ToySpectralSolver(fault="unsplit"),
        "root-squared-is-the-inverse": ToyRootSolver(fault="power"),
        "root-is-symmetric": ToyRootSolver(fault="turned"),
        "indefinite-has-no-root": ToyRootSolver(fault="hide"),
        "zero-stays-zero": ToySolver(fault="zero"),
        "damping-can-change": ToySolver(fault="keep"),
        "damping-wins-in-the-end": ToySolver(fault="floor"),
        "relative-damping-is-of-the-mean-eigenvalue": ToySolver(fault="relative"),
        "relative-damping-is-of-the-block": ToySpectralSolver(fault="whole"),
        "apply-is-repeatable": ToySolver(fault="noise"),
        "stats-are-true": ToySolver(fault="early", exact=False),
        "device-does-not-show": ToySolver(fault="device"),
        "float32-apply-is-close": ToySolver(fault="coarse"),
        "kept-solve-is-the-solve": ToySolver(fault="kept"),
    },
    "inverse_hessian": {
        "part-is-frozen": loose(ToyInverseHessian),
        "inverse-is-linear": ToyInverseHessian("bend"),
        "inverse-is-symmetric": ToyInverseHessian("turn"),
        "inverse-is-exact": ToyInverseHessian("double", exact=True),
        "inputs-are-untouched": ToyInverseHessian("in place"),
        "damping-can-change": ToyInverseHessian("keep"),
        "damping-wins-in-the-end": ToyInverseHessian("floor"),
        "zero-stays-zero": ToyInverseHessian("zero"),
        "stats-are-finite": ToyInverseHessian("stats"),
        "curvature-is-felt": ToyInverseHessian("none"),
        "inverse-keeps-its-unit": ToyInverseHessian("unit"),
        "float32-apply-is-close": ToyInverseHessian("wide"),
        "apply-is-of-single-rows": ToyInverseHessian("alone"),
        "blockwise-is-true": ToyInverseHessian("leak", blockwise=True),
        "split-is-true": ToyInverseHessian("unsplit", split=True),
        "leverages-are-self-influences": ToyInverseHessian("leverage", knowing=True),
        "two-sides-are-the-inverse": ToyInverseHessian("power", two_sided=True),
        "inverse-is-of-the-train-set": ToyConstantInverse("trace"),
        "inverse-is-of-a-mean": ToyInverseHessian("sum"),
        "inverse-ignores-batches": ToyInverseHessian("batches"),
        "inverse-is-positive-where-the-loss-is-convex": ToyInverseHessian("negative"),
        "device-does-not-show": ToyInverseHessian("device"),
        "fit-is-repeatable": ToyInverseHessian("noise"),
    },
    "scorer": {
        "part-is-frozen": loose(ToyScorer),
        "facts-are-declared": ToyScorer("locality"),
        "zero-rows-have-finite-scores": ToyScorer("zero", "inverse-norm"),
        "positions-do-not-show": ToyScorer("index"),
        "inputs-are-untouched": ToyScorer("in place", "self-influence"),
        "needs-are-all-it-reads": ToyScorer("reads"),
        "what-is-measured-is-read": ToyScorer("idle", "self-influence"),
        "needed-aux-is-read": ToyScorer("unread", weighs=True),
        "pair-adds-up-over-blocks": ToyScorer("bend"),
        "parts-are-inner-products": ToyScorer("thrice"),
        "scores-are-of-the-rows": ToyScorer("formed"),
        "scores-follow-the-rows": ToyScorer("place"),
        "tiles-are-their-own": ToyScorer("tile"),
        "queries-are-their-own": ToyScorer("queries"),
        "an-example-helps-itself": ToyScorer("negative"),
        "scale-keeps-order-and-sign": ToyScorer("threshold"),
        "scores-are-repeatable": ToyScorer("noise"),
        "device-does-not-show": ToyScorer("device"),
        "float32-scores-are-close": ToyScorer("coarse"),
    },
    "fold": {
        "part-is-frozen": loose(ToyFold),
        "facts-are-declared": ToyFold("order"),
        "needs-are-all-it-reads": ToyFold("asks late"),
        "learning-rates-are-read": ToyFold("unread", rated=True),
        "rates-keep-their-unit": ToyFold("square", rated=True),
        "names-do-not-show": ToyFold("name"),
        "counts-are-alike": ToyFold("three"),
        "one-checkpoint-is-itself": ToyFold("double"),
        "tiles-are-their-own": ToyFold("rows"),
        "state-is-all-it-keeps": ToyFold("number"),
        "fold-is-homogeneous": ToyFold("clamp"),
        "equal-weights-scale-the-rows": ToyFold("root", weighted=True),
        "equal-checkpoints-keep-the-sign": ToyFold("turn"),
        "inputs-are-untouched": ToyFold("in place"),
        "fold-is-repeatable": ToyFold("noise"),
        "device-does-not-show": ToyFold("device"),
        "float32-fold-is-close": ToyFold("coarse"),
    },
    "method": {
        "part-is-frozen": loose(ToyAttributor, PLAIN),
        "scores-follow-the-models": ToyDrawn(negative=True),
        "scores-are-a-matrix": ToyAttributor(PLAIN, "ids"),
        "permuted-train-rows-permute-scores": ToyAttributor(PLAIN, "train place"),
        "permuted-test-rows-permute-scores": ToyAttributor(PLAIN, "test place"),
        "queries-are-their-own": ToyAttributor(PLAIN, "queries"),
        "equal-examples-score-equal": ToyAttributor(PLAIN, "once"),
        "batches-do-not-show": ToyAttributor(PLAIN, "batches"),
        "memory-does-not-show": ToyAttributor(PLAIN, "memory"),
        "scores-are-repeatable": ToyAttributor(PLAIN, "noise"),
        "target-has-a-direction": ToyAttributor(PLAIN, "sign"),
        "target-is-of-test-examples": ToyAttributor(PLAIN, "sides"),
        "an-example-helps-itself": ToyAttributor(PLAIN, "negative"),
        "self-influence-is-the-diagonal": ToyFitting(PLAIN, "own"),
        "a-pool-is-scored-by-the-fit": ToyFitting(PLAIN, "pool"),
        "damping-can-change": lambda: dattri.Method(scorer=ToyScorer(), **inverting(fault="keep")),
        "removal-is-predicted": lambda: dattri.Method(scorer=ToyScorer("double"), **inverting()),
        "model-is-untouched": ToyAttributor(PLAIN, "eval"),
        "device-does-not-show": ToyAttributor(PLAIN, "device"),
        "float32-scores-are-close": ToyAttributor(PLAIN, "coarse"),
        "a-method-is-its-spec": lambda: dattri.Method(scorer=ForgetfulScorer()),
    },
    "setting": {
        "part-is-frozen": loose(ToySetting),
        "facts-are-declared": ToySetting("sizes"),
        "worlds-have-their-sizes": ToySetting("count"),
        "facts-are-plain": ToySetting("array"),
        "tests-are-not-trained-on": ToySetting("overlap"),
        "worlds-are-repeatable": ToySetting("facts"),
        "global-randomness-is-left-alone": ToySetting("global"),
        "seeds-make-other-worlds": ToySetting("fingerprint"),
        "retraining-alone-is-that-of-the-world": ToySetting("alone", alone=True),
        "fields-are-in-the-fingerprint": ToySetting("recipe"),
        "wrong-labels-are-counted": ToySetting("miscounts"),
        "what-is-left-out-does-not-show": ToySetting("masks"),
        "bad-arguments-are-refused": ToySetting("takes"),
        "model-is-trained-on-everything": ToySetting("everything"),
        "what-is-trained-on-is-fitted-better": ToySetting("other half", classes=False),
        "training-is-of-one-counterfactual": ToySetting("company"),
        "trajectory-ends-at-the-model": ToySetting("ends"),
        "steps-pass-through-the-trajectory": ToySetting("steps"),
        "outcomes-are-of-the-model": ToySetting("measure"),
    },
    "metric": {
        "part-is-frozen": loose(ToyDetection),
        "facts-are-declared": ToyDetection("words"),
        "value-lies-in-its-interval": ToyDetection("interval"),
        "tests-average-to-the-value": ToyDetection("some tests"),
        "global-randomness-is-left-alone": ToyDetection("global"),
        "names-do-not-show": ToyDetection("names"),
        "float32-scores-are-judged-alike": ToyDetection("float32"),
        "constant-scores-are-judged": ToyDetection("constant"),
        "few-tests-are-judged-or-refused": ToyDetection("one test"),
        "direction-of-the-target-is-heeded": ToyRemoval("target"),
        "scores-that-add-up-are-judged-best": ToyRemoval("neighbour"),
        "metric-is-repeatable": ToyDetection("noise"),
        "what-is-drawn-is-of-the-seed": ToyDetection("one state", drawn=True),
        "seeds-are-repeatable": ToyDetection("seed 0 alone", drawn=True),
        "evidence-is-untouched": ToyDetection("in place"),
        "scale-does-not-show": ToyDetection("threshold"),
        "order-of-examples-does-not-show": ToyDetection("place"),
        "needs-are-all-it-reads": ToyDetection("own"),
        "missing-evidence-is-refused": ToyDetection("silent", fact=True),
        "bad-scores-are-refused": ToyDetection("unchecked"),
        "random-scores-give-chance": ToyDetection("chance"),
        "influence-is-better-than-its-negative": ToyDetection("turned"),
    },
}

# Laws that a mutant breaks besides its own, because it must.
ALSO = {
    # Rows of the loss that are wrong are not those that a right pull gives.
    ("source", "rows-are-their-own"): {"pull-of-the-slope-is-the-loss-row"},
    ("source", "rows-are-gradients"): {"pull-of-the-slope-is-the-loss-row"},
    # Rows that differ each time differ where a source was moved or reopened as well.
    ("source", "rows-are-repeatable"): {
        "moved-rows-are-bound-rows",
        "reopened-rows-are-bound-rows",
    },
    # <A g, k> = <g, A k> for all g and k makes A linear.
    ("solver", "inverse-is-linear"): {"inverse-is-symmetric"},
    ("inverse_hessian", "inverse-is-linear"): {"inverse-is-symmetric", "inverse-keeps-its-unit"},
    # Where no curvature is felt, its directions are not.
    ("inverse_hessian", "curvature-is-felt"): {"inverse-is-of-the-train-set"},
    # A thousandth of an antisymmetric matrix has no unit.
    ("inverse_hessian", "inverse-is-symmetric"): {"inverse-keeps-its-unit"},
    # Where as many of the first examples are taken the two halves are one.
    ("setting", "what-is-left-out-does-not-show"): {"what-is-trained-on-is-fitted-better"},
    # Formed rows that are doubled have another norm.
    ("projector", "map-is-of-the-row"): {"norms-are-kept-in-the-mean"},
    # The negative of an inverse is that at any damping.
    ("inverse_hessian", "inverse-is-positive-where-the-loss-is-convex"): {
        "damping-wins-in-the-end"
    },
    # A map of the global random state is another each time that it is built, on any device.
    ("projector", "map-is-of-its-stream"): {"device-does-not-show"},
    # Of two values that draw numbers one differs after a use on other data, as ever.
    ("metric", "metric-is-repeatable"): {"part-is-frozen", "seeds-are-repeatable"},
    # Where the value depends on places and the ends do not, the width of the interval does.
    ("metric", "order-of-examples-does-not-show"): {"what-is-drawn-is-of-the-seed"},
    # Models that are taken for those of other examples are so by the place of these.
    ("metric", "scores-that-add-up-are-judged-best"): {"what-is-drawn-is-of-the-seed"},
    # The global random state is something that a fold keeps beside its state.
    ("fold", "fold-is-repeatable"): {"state-is-all-it-keeps"},
}


def made(part):
    with using(registry()):
        return part() if callable(part) and not isinstance(part, type) else part


@pytest.mark.parametrize("kind", KINDS)
def test_every_law_has_a_mutant(kind):
    assert set(BROKEN[kind]) == {law.name for law in laws_of(kind)}
    assert set(GOOD) == set(BROKEN) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_good_parts_break_no_law_and_meet_them_all(kind):
    held = set()
    for part in GOOD[kind]:
        report = check(kind, made(part), registry=registry())
        assert report.ok, str(report)
        held |= {finding.law for finding in report.findings if finding.status == "passed"}
    assert held == {law.name for law in laws_of(kind)}


def mutants(*kinds):
    return pytest.mark.parametrize(
        ("kind", "law"), [(kind, law) for kind in kinds for law in BROKEN[kind]]
    )


LONG = ("source", "method")
"""All laws of a mutant of these take a second."""


@mutants(*LONG)
def test_a_mutant_breaks_its_law(kind, law):
    by_name = {one.name: one for one in laws_of(kind)}
    with using(registry()):
        finding = find(by_name[law], bench_of(kind, made(BROKEN[kind][law])))
    assert finding.status == "failed"
    assert "Error:" not in finding.detail  # caught by its numbers, not by a crash


@mutants(*(kind for kind in BROKEN if kind not in LONG))
def test_a_mutant_breaks_its_law_alone(kind, law):
    alone(kind, law)


@pytest.mark.slow
@mutants(*LONG)
def test_a_mutant_of_long_laws_breaks_its_law_alone(kind, law):
    alone(kind, law)


def alone(kind, law):
    report = check(kind, made(BROKEN[kind][law]), registry=registry())
    broken = {finding.law for finding in report.failures}
    assert broken == {law} | ALSO.get((kind, law), set()), str(report)
    assert not report.ok
    details = [finding.detail for finding in report.failures if finding.law == law]
    assert "Error:" not in details[0]  # caught by its numbers, not by a crash


@pytest.mark.parametrize("part", [ToyMoment("sign"), ToyMoment("weight", blockwise=True)])
def test_rows_are_held_to_be_the_same_each_time_and_of_every_block(part):
    report = check("curvature", part, registry=registry())
    assert {finding.law for finding in report.failures} == {"rows-are-of-the-operator"}


def test_a_source_that_is_fitted_refuses_to_be_bound_to_a_sample():
    report = check("source", ToyDataSource("binds"), registry=registry())
    assert {f.law for f in report.failures} == {"a-fit-is-of-the-whole-train-set"}, str(report)


def test_the_halves_of_a_reduced_inverse_are_held_to_make_the_whole():
    report = check("solver", ToySolver(fault="halves", reduced=True), registry=registry())
    assert {finding.law for finding in report.failures} == {"reduced-sides-are-true"}


@pytest.mark.parametrize("solver", ["woodbury", "datainf"])
def test_a_solver_that_reads_rows_meets_the_laws_on_toy_operators(solver):
    report = check("solver", solver)
    assert report.ok, str(report)
    met = {finding.law for finding in report.findings if finding.status == "passed"}
    assert {"inverse-is-linear", "damping-can-change", "blockwise-is-true"} <= met
    assert ("inverse-is-exact" in met) == (solver == "woodbury")
