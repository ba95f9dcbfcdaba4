"""Faults that a law with a mutant of its own has to find as well."""

import pytest
from toy_constant_parts import ToyConstant, ToyConstantInverse
from toy_experiment_parts import ToyDetection, ToyRemoval, ToySetting
from toy_row_parts import ToyFlatProjector, ToyFold, ToyScorer

from dattri_core.laws import check

FAULTS = [
    ("projector", ToyFlatProjector("scale"), "norms-are-kept-in-the-mean"),
    ("projector", ToyFlatProjector("unsigned"), "norms-are-kept-in-the-mean"),
    ("curvature", ToyConstant("fixed"), "operator-is-of-the-train-set"),
    ("curvature", ToyConstant("first layer"), "operator-is-of-the-train-set"),
    ("inverse_hessian", ToyConstantInverse("fixed"), "inverse-is-of-the-train-set"),
    ("inverse_hessian", ToyConstantInverse("first layer"), "inverse-is-of-the-train-set"),
    ("inverse_hessian", ToyConstantInverse("nearest"), "inverse-is-of-the-train-set"),
    ("scorer", ToyScorer("absolute"), "an-example-helps-itself"),
    ("scorer", ToyScorer("itself"), "positions-do-not-show"),
    ("scorer", ToyScorer("floor"), "scale-keeps-order-and-sign"),
    ("scorer", ToyScorer("tile weight", weighs=True), "tiles-are-their-own"),
    ("scorer", ToyScorer("test weight", weighs=True), "queries-are-their-own"),
    ("scorer", ToyScorer("negative weight", weighs=True), "an-example-helps-itself"),
    ("fold", ToyFold("weighs"), "needs-are-all-it-reads"),
    ("fold", ToyFold("columns"), "tiles-are-their-own"),
    ("fold", ToyFold("zero"), "fold-is-homogeneous"),
    ("fold", ToyFold("floor"), "fold-is-homogeneous"),
    ("metric", ToyDetection("infinite"), "bad-scores-are-refused"),
    ("metric", ToyDetection("rows"), "bad-scores-are-refused"),
    ("metric", ToyDetection("one interval"), "value-lies-in-its-interval"),
    ("metric", ToyDetection("bounds"), "value-lies-in-its-interval"),
    ("metric", ToyDetection("in world"), "evidence-is-untouched"),
    ("metric", ToyDetection("mode"), "evidence-is-untouched"),
    ("metric", ToyDetection("squares"), "scale-does-not-show"),
    ("metric", ToyDetection("silence"), "constant-scores-are-judged"),
    ("metric", ToyDetection("one seed", drawn=True), "what-is-drawn-is-of-the-seed"),
    ("metric", ToyDetection("sorted", drawn=True), "what-is-drawn-is-of-the-seed"),
    ("metric", ToyRemoval("one subset"), "what-is-drawn-is-of-the-seed"),
    ("metric", ToyRemoval("margin"), "direction-of-the-target-is-heeded"),
    ("metric", ToyRemoval("first tests"), "order-of-examples-does-not-show"),
    ("setting", ToySetting("trains globally"), "global-randomness-is-left-alone"),
    ("setting", ToySetting("dtype"), "global-randomness-is-left-alone"),
    ("setting", ToySetting("by mask"), "training-is-of-one-counterfactual"),
    ("setting", ToySetting("right labels"), "what-is-left-out-does-not-show"),
    ("setting", ToySetting("train size"), "seeds-make-other-worlds"),
    ("setting", ToySetting("mode"), "model-is-trained-on-everything"),
    ("setting", ToySetting("flat pictures"), "worlds-have-their-sizes"),
]


@pytest.mark.parametrize(("kind", "part", "law"), FAULTS)
def test_a_fault_breaks_one_law(kind, part, law):
    report = check(kind, part)
    assert {finding.law for finding in report.failures} == {law}, str(report)
    (finding,) = report.failures
    assert "Error:" not in finding.detail.split(":")[0]
