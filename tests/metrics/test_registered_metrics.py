"""Every registered metric: made by name, a `Metric`, repeatable, refused before any training."""

import numpy as np
import pytest
from attrs import evolve
from toy_world import Additive, effects, evidence_of

import dattri_core as dattri
from dattri_core import InputError, default_registry

NAMES = [
    entry.name
    for entry in default_registry().entries_of("metric")
    if entry.target.startswith("dattri_metrics.")
]
NEEDS = {"mislabelled", "retraining", "labels", "self-influence", "attribute"}


def made(name):
    return default_registry().make("metric", name)


def evidence(scores, retraining, **changes):
    return evidence_of(scores, retraining, attribute=lambda task: scores[::-1], **changes)


def test_all_are_there():
    assert sorted(NAMES) == [
        "brittleness",
        "brittleness-share",
        "class-detection",
        "insertion-curve",
        "lds",
        "loo-pearson",
        "loo-spearman",
        "mislabel-auroc",
        "mislabel-average-precision",
        "mislabel-inspection-area",
        "mixed-source-detection",
        "model-randomisation",
        "rank-stability",
        "removal-curve",
        "shortcut-detection",
        "subclass-detection",
        "top-k-overlap",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_it_measures_by_what_it_says_it_needs(name):
    part = made(name)
    assert isinstance(part, dattri.Metric)
    plain = {need for need in part.needs if not need.startswith("fact:")}
    assert plain <= NEEDS
    truth = effects()
    given = evidence(truth, Additive(truth, noise=0.3))
    if "retraining" not in part.needs:
        given = evolve(given, outcomes=None)
    if "attribute" not in part.needs:
        given = evolve(given, attribute=None)
    found = part.measure(given)
    assert isinstance(found, dattri.MetricResult)
    assert found.low <= found.value <= found.high
    assert np.isfinite([found.low, found.high, found.chance]).all()
    assert part.measure(given) == found
    assert default_registry().spec_of(part) == {"name": name}


@pytest.mark.parametrize("name", NAMES)
def test_bad_scores_are_refused_before_any_training(name):
    retraining = Additive(effects())
    for bad in (effects(23), np.full((24, 6), np.nan)):
        with pytest.raises(InputError, match=r"world has 24 train|is nan"):
            made(name).measure(evidence(bad, retraining))
    assert retraining.asked == []


@pytest.mark.parametrize("name", [n for n in NAMES if "retraining" in made(n).needs])
def test_without_a_store_the_message_says_how_to_get_one(name):
    if name == "rank-stability":
        pytest.skip("it trains without a store")
    with pytest.raises(InputError, match=f"{name.removesuffix('-share')}: .*ground_truth"):
        made(name).measure(evidence_of(effects(), Additive(effects()), outcomes=None))


def test_a_target_that_is_not_measured_is_named():
    given = evidence_of(effects(), Additive(effects()), target="margin")
    with pytest.raises(InputError, match=r"measures correct, gain, loss.*not 'margin'"):
        made("lds").measure(given)


def test_scores_and_tensors_are_taken_as_they_are():
    truth = effects().astype(np.float32)
    want = made("lds").measure(evidence(truth, Additive(truth)))
    given = evidence(dattri.Scores(truth), Additive(truth))
    assert made("lds").measure(given) == want
