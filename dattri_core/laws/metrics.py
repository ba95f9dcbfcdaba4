"""Laws of metrics: what a number that judges scores must keep, whatever it measures."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen

from dattri_core.errors import InputError
from dattri_core.experiment import Evidence, Metric, MetricResult
from dattri_core.laws.evaluated import N_TEST, N_TRAIN, Array, Evaluated
from dattri_core.laws.global_state import unchanged, watched
from dattri_core.laws.law import law, require, require_equal
from dattri_core.laws.untouched import contents, require_frozen
from dattri_core.task import Task

WORDS = frozenset({"mislabelled", "retraining", "labels", "self-influence", "attribute"})
"""What a metric may need, besides facts."""
FACT = "fact:"
Factor = float | Array
DRAWS = 20
"""Random scores of which the mean is compared with chance."""
DEVIATIONS = 5.0
"""Standard errors by which that mean may differ."""
TOLERANCE = 1e-9


@frozen(eq=False, slots=False)
class MetricBench:
    """A metric amid a toy world that it can be told everything about."""

    part: Metric

    @cached_property
    def facts(self) -> tuple[str, ...]:
        """Return the names of the facts that it needs."""
        needs = sorted(self.part.needs)
        return tuple(word.removeprefix(FACT) for word in needs if word.startswith(FACT))

    @cached_property
    def evaluated(self) -> Evaluated:
        """Return the toy world."""
        return Evaluated.made(self.facts)

    def informed(
        self, factor: Factor = 1.0, evaluated: Evaluated | None = None, seed: int = 0
    ) -> Evidence:
        """Return evidence of influence functions, times a factor, or one for each test."""
        at = self.evaluated if evaluated is None else evaluated
        return Evidence(
            scores=factor * at.attribute(at.world.task),
            self_influence=np.mean(factor) * at.self_influence,
            world=at.world,
            outcomes=at.outcomes,
            attribute=lambda task: factor * at.attribute(task),
            seed=seed,
        )

    def uninformed(self, seed: int) -> Evidence:
        """Return evidence of a method that knows nothing."""
        draw, at = np.random.default_rng(seed), self.evaluated

        def attribute(task: Task) -> Array:
            del task
            return draw.standard_normal((N_TRAIN, N_TEST))

        own = draw.standard_normal(N_TRAIN)
        scores = draw.standard_normal((N_TRAIN, N_TEST))
        return Evidence(scores, own, at.world, at.outcomes, attribute, seed)

    @cached_property
    def result(self) -> MetricResult:
        """Return what it says of influence functions."""
        return self.part.measure(self.informed())

    @cached_property
    def results(self) -> Mapping[str, MetricResult]:
        """Return what it says of several scores, by what these are."""
        return {
            "influence": self.result,
            "minus influence": self.part.measure(self.informed(-1.0)),
            "random scores": self.part.measure(self.uninformed(0)),
            "other random scores": self.part.measure(self.uninformed(1)),
        }


def same_result(
    got: MetricResult, want: MetricResult, what: str, tolerance: float = TOLERANCE
) -> None:
    """Raise `LawBroken` unless two results have the same numbers."""
    for name in ("value", "low", "high", "chance", "ceiling"):
        one, two = getattr(got, name), getattr(want, name)
        agree = one == two or (
            one is not None
            and two is not None
            and math.isclose(one, two, rel_tol=tolerance, abs_tol=tolerance)
        )
        require(agree, f"{what}: {name} is {one}, expected {two}")


@law("metric")
def part_is_frozen(bench: MetricBench) -> None:
    """No field can be set; after it measured other scores, the value and the part are the same."""

    def use(some: MetricBench, other: bool) -> torch.Tensor:
        found = some.part.measure(some.uninformed(1) if other else some.informed())
        return torch.tensor([found.value, found.low, found.high], dtype=torch.float64)

    require_frozen(bench, use)


@law("metric")
def facts_are_declared(bench: MetricBench) -> None:
    """Needs name nothing but what evidence can hold, and facts of the world."""
    needs = bench.part.needs
    unknown = {word for word in needs - WORDS if not (word.startswith(FACT) and word != FACT)}
    require(not unknown, f"needs name {sorted(unknown)}; known are {sorted(WORDS)} and fact:NAME")


@law("metric")
def value_lies_in_its_interval(bench: MetricBench) -> None:
    """low <= value <= high, finite, at a confidence in (0, 1) and in its bounds, for any scores."""
    for what, found in bench.results.items():
        require(isinstance(found, MetricResult), f"of {what} it gives a {type(found).__name__}")
        fields = ("value", "low", "high", "chance", "ceiling")
        numbers = {name: getattr(found, name) for name in fields}
        for name, number in numbers.items():
            if name == "ceiling" and number is None:
                continue
            kind = type(number).__name__
            plain = isinstance(number, float | int)
            require(plain, f"{name} of {what} is a {kind}, expected a float: float({name})")
            require(
                math.isfinite(number), f"{name} of {what} is {number}, expected a finite number"
            )
        within = found.low <= found.value <= found.high
        require(within, f"the value of {what} is outside of its interval: {found}")
        require(0 < found.confidence < 1, f"confidence is {found.confidence}, expected 0.95, say")
        if found.bounds is None:
            continue
        least, most = found.bounds
        beyond = {k: n for k, n in numbers.items() if n is not None and not least <= n <= most}
        require(
            not beyond, f"of {what}, {beyond} lie outside of the bounds {found.bounds} that it says"
        )


def _says_nothing_of_tests(bench: MetricBench) -> str | None:
    return "it gives no numbers of single tests" if bench.result.per_test is None else None


@law("metric", _says_nothing_of_tests)
def tests_average_to_the_value(bench: MetricBench) -> None:
    """The mean of per_test is the value, over the same tests for all scores of a world."""
    counts = {what: len(found.per_test or ()) for what, found in bench.results.items()}
    for what, found in bench.results.items():
        mean = sum(found.per_test or ()) / max(1, counts[what])
        require(
            math.isclose(mean, found.value, rel_tol=1e-6, abs_tol=1e-9),
            f"the mean of per_test is {mean} for {what}, the value {found.value}",
        )
    alike = len(set(counts.values())) == 1 and max(counts.values()) <= N_TEST
    require(
        alike,
        f"per_test has so many numbers: {counts}; expected the same tests of {N_TEST} for all "
        "scores, so that methods can be compared test by test",
    )


@law("metric")
def metric_is_repeatable(bench: MetricBench) -> None:
    """The same evidence gives the same bits, whatever the global random state."""
    found = []
    with watched():
        for seed in (1, 2):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            found.append(bench.part.measure(bench.informed()))
    same_result(found[1], found[0], "measured again", 0.0)


@law("metric")
def global_randomness_is_left_alone(bench: MetricBench) -> None:
    """Measuring leaves global random generators and settings as they are."""
    evidence = bench.informed()
    with watched() as changed:
        bench.part.measure(evidence)
        found = changed()
    require(*unchanged(found, "measure"))


@law("metric")
def evidence_is_untouched(bench: MetricBench) -> None:
    """Measuring leaves scores, self-influence, data, facts and the model as they are."""
    fresh = Evaluated.made(bench.facts)
    evidence = bench.informed(evaluated=fresh)
    before = _held(evidence)
    bench.part.measure(evidence)
    changed = [name for name, held in _held(evidence).items() if held != before[name]]
    require(not changed, f"measure changed {', '.join(changed)}; work on a copy")


def _held(evidence: Evidence) -> dict[str, Any]:
    """Return what evidence holds, by name, to be compared with the same later."""
    world = evidence.world
    modes = [module.training for module in world.task.model.modules()]
    return {
        "the scores": contents(evidence.scores),
        "the self-influence": contents(evidence.self_influence),
        "world.train": contents(world.train),
        "world.test": contents(world.test),
        "world.true_labels": contents(world.true_labels),
        "world.facts": contents(world.facts),
        "the model's weights": contents(world.task.model.state_dict()),
        "the model's mode": modes,
    }


@law("metric")
def scale_does_not_show(bench: MetricBench) -> None:
    """The metric of a S = that of S for a = 3, 1e-15, 1e20: conventions are not judged."""
    for factor in (3.0, 1e-15, 1e20):
        found = bench.part.measure(bench.informed(factor))
        same_result(found, bench.result, f"the metric of {factor:g} S", 1e-6)


@law("metric")
def needs_are_all_it_reads(bench: MetricBench) -> None:
    """A metric works with evidence that holds only what its needs name."""
    lean = bench.informed()
    unread = WORDS - bench.part.needs
    if "mislabelled" in bench.part.needs:
        unread -= {"labels"}  # which are wrong shows by comparison
    for word in unread:
        lean = _without(lean, word)
    try:
        bench.part.measure(lean)
    except Exception as error:
        require(False, f"with no more than {sorted(bench.part.needs)} it raises {error!r}")


def _without(evidence: Evidence, word: str) -> Evidence:
    world = evidence.world
    if word == "mislabelled":
        return evolve(evidence, world=evolve(world, true_labels=None))
    if word == "labels":
        bare = evolve(world, train=world.train[:1], test=world.test[:1], true_labels=None)
        return evolve(evidence, world=bare)
    if word.startswith(FACT):
        kept = {k: v for k, v in world.facts.items() if k != word.removeprefix(FACT)}
        return evolve(evidence, world=evolve(world, facts=kept))
    fields = {
        "retraining": "outcomes",
        "self-influence": "self_influence",
        "attribute": "attribute",
    }
    changes: dict[str, Any] = {fields[word]: None} if word in fields else {}
    return evolve(evidence, **changes)


@law("metric")
def missing_evidence_is_refused(bench: MetricBench) -> None:
    """Without something that needs name there is an `InputError`, or the same value."""
    for word in sorted(bench.part.needs):
        evidence = _without(bench.informed(), word)
        try:
            found = bench.part.measure(evidence)
        except InputError:
            continue
        except Exception as error:
            require(False, f"without {word!r} it raises {error!r}, expected an InputError")
        require(
            found.value == bench.result.value,
            f"without {word!r}, which it needs, the value is {found.value} instead of "
            f"{bench.result.value}, and no error",
        )


@law("metric")
def bad_scores_are_refused(bench: MetricBench) -> None:
    """Scores that are not finite, or not of the world's size, are an `InputError`."""
    good = bench.informed()
    assert good.self_influence is not None
    scores, own = good.scores, good.self_influence
    turned = bench.part.measure(evolve(good, scores=-scores))
    judges = turned.value != bench.result.value  # scores, not the self-influence alone
    for number in (np.nan, np.inf, -np.inf):
        holed, other = scores.copy(), own.copy()
        holed[3, 1] = other[3] = number
        _require_refused(bench, f"{number}", evolve(good, scores=holed, self_influence=other))
    for what, wrong, influence in (
        ("too few rows", scores[1:], own[1:]),
        ("too many rows", np.vstack([scores, scores[:1]]), np.append(own, own[0])),
        ("too few columns", scores[:, 1:], own),
        ("too many columns", np.hstack([scores, scores[:, :1]]), own),
    ):
        if judges or len(wrong) != len(scores):
            _require_refused(bench, what, evolve(good, scores=wrong, self_influence=influence))


def _require_refused(bench: MetricBench, what: str, evidence: Evidence) -> None:
    """Raise `LawBroken` unless scores, from evidence and for any model, are an `InputError`."""
    size = bench.informed().scores.shape
    got = f"{what} in scores of {evidence.scores.shape} and in the self-influence"
    fix = f"raise an InputError unless scores are finite and of the world's size {size}"
    try:
        found = bench.part.measure(evolve(evidence, attribute=lambda task: evidence.scores))
    except InputError:
        return
    except Exception as error:
        require(False, f"{got}: it raises {error!r}, expected an InputError; {fix}")
    require(False, f"{got}: it gives {found.value}, expected an InputError; {fix}")


@law("metric")
def random_scores_give_chance(bench: MetricBench) -> None:
    """The mean of the metric over random scores is its chance level."""
    found = [bench.part.measure(bench.uninformed(seed)) for seed in range(DRAWS)]
    gaps = np.array([result.value - result.chance for result in found])
    error = gaps.std(ddof=1) / math.sqrt(DRAWS)
    require(
        abs(gaps.mean()) <= DEVIATIONS * error + 1e-6,
        f"over {DRAWS} random scores the value is {gaps.mean():+.4f} from chance, expected 0 to "
        f"{DEVIATIONS * error:.4f}",
    )
    ways = {result.higher_is_better for result in found}
    require_equal(ways, {bench.result.higher_is_better}, "which way is good")


def _judges_by_truth(bench: MetricBench) -> str | None:
    return "it compares a method with itself" if "attribute" in bench.part.needs else None


@law("metric", _judges_by_truth)
def influence_is_better_than_its_negative(bench: MetricBench) -> None:
    """Influence functions on least squares are judged better than chance, and than minus them."""
    good = 1.0 if bench.result.higher_is_better else -1.0
    turned = bench.part.measure(bench.informed(-1.0))
    found, chance = bench.result.value, bench.result.chance
    require(good * (found - chance) >= 0, f"influence has {found}, chance is {chance}")
    require(good * (found - turned.value) > 0, f"influence has {found}, minus it {turned.value}")
