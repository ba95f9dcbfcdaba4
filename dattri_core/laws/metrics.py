"""Laws of metrics: what a number that judges scores must keep, whatever it measures."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen

from dattri_core.errors import InputError
from dattri_core.experiment import Evidence, Metric, MetricResult
from dattri_core.laws.evaluated import N_TEST, N_TRAIN, Array, Evaluated
from dattri_core.laws.law import law, require, require_equal
from dattri_core.laws.untouched import require_frozen
from dattri_core.task import Task

WORDS = frozenset({"mislabelled", "retraining", "labels", "self-influence", "attribute"})
"""What a metric may need, besides facts."""
FACT = "fact:"
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

    def informed(self, factor: float = 1.0, evaluated: Evaluated | None = None) -> Evidence:
        """Return evidence of influence functions, times a factor."""
        at = self.evaluated if evaluated is None else evaluated
        return Evidence(
            scores=factor * at.attribute(at.world.task),
            self_influence=factor * at.self_influence,
            world=at.world,
            outcomes=at.outcomes,
            attribute=lambda task: factor * at.attribute(task),
        )

    def uninformed(self, seed: int) -> Evidence:
        """Return evidence of a method that knows nothing."""
        random, at = np.random.default_rng(seed), self.evaluated

        def attribute(task: Task) -> Array:
            del task
            return random.standard_normal((N_TRAIN, N_TEST))

        own = random.standard_normal(N_TRAIN)
        scores = random.standard_normal((N_TRAIN, N_TEST))
        return Evidence(scores, own, at.world, at.outcomes, attribute, seed)

    @cached_property
    def result(self) -> MetricResult:
        """Return what it says of influence functions."""
        return self.part.measure(self.informed())


def _same(got: MetricResult, want: MetricResult, what: str, tolerance: float = TOLERANCE) -> None:
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
    """low <= value <= high, finite, at a confidence in (0, 1); the mean of per_test is value."""
    found = bench.result
    require(isinstance(found, MetricResult), f"it gives a {type(found).__name__}")
    numbers = {"value": found.value, "low": found.low, "high": found.high, "chance": found.chance}
    for name, number in numbers.items():
        require(math.isfinite(number), f"{name} is {number}")
    require(
        found.low <= found.value <= found.high, f"the value is outside of its interval: {found}"
    )
    require(0 < found.confidence < 1, f"confidence is {found.confidence}")
    require(
        found.ceiling is None or math.isfinite(found.ceiling), f"the ceiling is {found.ceiling}"
    )
    if found.per_test is not None:
        mean = sum(found.per_test) / len(found.per_test)
        require(
            math.isclose(mean, found.value, rel_tol=1e-6, abs_tol=1e-9),
            f"the mean of per_test is {mean}, the value {found.value}",
        )


@law("metric")
def metric_is_repeatable(bench: MetricBench) -> None:
    """The same evidence gives the same bits, whatever the global random state."""
    with torch.random.fork_rng(devices=[]):
        state = np.random.get_state()  # noqa: NPY002 - the global state is what must not matter
        try:
            found = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                found.append(bench.part.measure(bench.informed()))
        finally:
            np.random.set_state(state)  # noqa: NPY002
    _same(found[1], found[0], "measured again", 0.0)


@law("metric")
def evidence_is_untouched(bench: MetricBench) -> None:
    """Measuring leaves scores and self-influence as they are."""
    evidence = bench.informed()
    assert evidence.self_influence is not None
    scores, own = evidence.scores.copy(), evidence.self_influence.copy()
    bench.part.measure(evidence)
    require(np.array_equal(evidence.scores, scores), "the scores were changed")
    require(np.array_equal(evidence.self_influence, own), "the self-influence was changed")


@law("metric")
def scale_does_not_show(bench: MetricBench) -> None:
    """The metric of 3 S = that of S: what methods differ in by convention is not judged."""
    _same(bench.part.measure(bench.informed(3.0)), bench.result, "the metric of 3 S", 1e-6)


def _draws_no_sets(bench: MetricBench) -> str | None:
    return "it draws train sets by position" if "retraining" in bench.part.needs else None


@law("metric", _draws_no_sets)
def order_of_examples_does_not_show(bench: MetricBench) -> None:
    """The value for the same examples in another order is the same."""
    random = np.random.default_rng(0)
    turned = bench.evaluated.ordered(random.permutation(N_TRAIN), random.permutation(N_TEST))
    found = bench.part.measure(bench.informed(evaluated=turned))
    for name in ("value", "chance"):
        got, want = getattr(found, name), getattr(bench.result, name)
        require(
            math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-9),
            f"{name} for examples in another order: got {got}, expected {want}",
        )


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
    holed, own = good.scores.copy(), good.self_influence.copy()
    holed[3, 1] = own[3] = np.nan

    def holes(task: Task) -> Array:
        del task
        return holed

    for what, scores, influence, attribute in (
        ("NaN", holed, own, holes),
        ("too few rows", good.scores[1:], good.self_influence[1:], good.attribute),
    ):
        bad = evolve(good, scores=scores, self_influence=influence, attribute=attribute)
        try:
            found = bench.part.measure(bad)
        except InputError:
            continue
        except Exception as error:
            require(False, f"{what}: it raises {error!r}, expected an InputError")
        require(False, f"{what} in scores and self-influence: it gives {found.value}")


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
