"""Laws of metrics in other worlds: in another order, with other names, targets and few tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import evolve, frozen

from dattri_core.errors import InputError
from dattri_core.experiment import Counterfactual, Evidence, MetricResult
from dattri_core.laws.evaluated import N_TEST, N_TRAIN, Array, LeastSquares
from dattri_core.laws.law import NotApplicable, law, require
from dattri_core.laws.metrics import DEVIATIONS, DRAWS, TOLERANCE, MetricBench, same_result

SIGNS = np.array([-1.0] * 3 + [1.0] * (N_TEST - 3))
"""Turn the scores of some tests, so that it shows which tests count."""


@law("metric")
def order_of_examples_does_not_show(bench: MetricBench) -> None:
    """The value for the same examples in another order is the same."""
    # Train sets are drawn by position, so a metric that needs retraining sees the tests turned
    # only. One that draws numbers of its own may differ, but not in the mean over seeds.
    random = np.random.default_rng(0)
    order, turn = random.permutation(N_TRAIN), random.permutation(N_TEST)
    sides = "examples"
    if "retraining" in bench.part.needs:
        order, sides = np.arange(N_TRAIN), "tests"
    turned = bench.evaluated.ordered(order, turn)

    def measured(seed: int) -> tuple[MetricResult, MetricResult]:
        plain = bench.informed(SIGNS, seed=seed)
        other = bench.informed(SIGNS[turn], evaluated=turned, seed=seed)
        return bench.part.measure(plain), bench.part.measure(other)

    for name in ("value", "chance"):
        want, got = (getattr(one, name) for one in measured(0))
        if math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-9):
            continue
        gap, error = _mean_gap(measured, name)
        require(
            abs(gap) <= DEVIATIONS * error,
            f"{name} for {sides} in another order: got {got}, expected {want}; over {DRAWS} seeds "
            f"it differs by {gap:+.2e}, expected 0 to {DEVIATIONS * error:.1e}; let nothing depend "
            "on the place of an example",
        )


def _mean_gap(
    measured: Callable[[int], tuple[MetricResult, MetricResult]], name: str
) -> tuple[float, float]:
    """Return by how much a number differs in the mean over seeds, and that mean's error.

    The error is 0 where the number is the same for five seeds: then nothing is drawn.
    """
    found: list[tuple[float, float]] = []
    for seed in range(DRAWS):
        plain, other = (getattr(one, name) for one in measured(seed))
        found.append((plain, other))
        if seed == 4 and all(one == plain for one, _ in found):
            return other - plain, 0.0
    gaps = np.array([other - plain for plain, other in found])
    return float(gaps.mean()), float(gaps.std(ddof=1)) / math.sqrt(DRAWS)


@law("metric")
def names_do_not_show(bench: MetricBench) -> None:
    """The metric is the same when examples have other ids, in another alphabetical order."""
    evidence = bench.informed()
    world = evolve(
        evidence.world,
        train_ids=tuple(f"x{999 - i}" for i in range(N_TRAIN)),
        test_ids=tuple(f"a{999 - j}" for j in range(N_TEST)),
    )
    found = bench.part.measure(evolve(evidence, world=world))
    same_result(found, bench.result, "with other ids", 1e-6)


@law("metric")
def float32_scores_are_judged_alike(bench: MetricBench) -> None:
    """Scores in float32, which most methods give, have the value of the same in float64."""
    evidence = bench.informed()
    attribute = evidence.attribute
    assert attribute is not None
    assert evidence.self_influence is not None
    low = evolve(
        evidence,
        scores=evidence.scores.astype(np.float32),
        self_influence=evidence.self_influence.astype(np.float32),
        attribute=lambda task: attribute(task).astype(np.float32),
    )
    same_result(bench.part.measure(low), bench.result, "of scores in float32", 1e-5)


@law("metric")
def constant_scores_are_judged(bench: MetricBench) -> None:
    """Scores all 0, or 0 for one test: finite numbers, none above all random ones, or refused."""
    one = np.ones(N_TEST)
    one[2] = 0.0
    _require_finite(bench, bench.informed(one), "scores that are all 0 for one test")
    found = _require_finite(bench, bench.informed(0.0), "scores that are all 0")
    if found is None:
        return
    good = 1.0 if found.higher_is_better else -1.0
    draws = [bench.part.measure(bench.uninformed(seed)).value for seed in range(DRAWS)]
    best = good * max(good * value for value in draws)
    require(
        good * (found.value - best) <= TOLERANCE,
        f"scores that are all 0 have {found.value}, the best of {DRAWS} random ones {best}: "
        "silence is rewarded; count ties as half won, or as 0",
    )


@law("metric")
def few_tests_are_judged_or_refused(bench: MetricBench) -> None:
    """A world of one test, or of two, gives finite numbers, or an `InputError`."""
    for count in (1, 2):
        at = bench.evaluated
        few = evolve(at, test_examples=at.test_examples.take(np.arange(count)))
        _require_finite(bench, bench.informed(evaluated=few), f"a world of {count} tests")


def _require_finite(bench: MetricBench, evidence: Evidence, what: str) -> MetricResult | None:
    """Return what a metric says, None where it refuses; raise `LawBroken` for anything else."""
    try:
        found: MetricResult = bench.part.measure(evidence)
    except InputError:
        return None
    except Exception as error:
        require(False, f"{what}: it raises {error!r}, expected numbers or an InputError")
    numbers = (found.low, found.value, found.high, found.chance)
    require(
        all(math.isfinite(number) for number in numbers),
        f"{what}: the value is {found}, chance {found.chance}; expected finite numbers, or an "
        "InputError",
    )
    return found


@frozen(eq=False)
class SumsOfScores:
    """The `Outcomes` of models whose margin is a sum over their train set, without noise.

    Args:
        scores: What each train example adds, ``[n_train, n_test]``.
        left: Share of the sum of absolute scores that the margin of the whole train set is.
    """

    scores: Array
    left: float = 0.1

    def outcomes(self, counterfactuals: Sequence[Counterfactual], target: str) -> Array:
        """Return the margin, whether it is above zero, or minus it as a loss, ``[k, n_test]``."""
        without = ~np.stack([one.mask for one in counterfactuals])
        margin: Array = self.left * np.abs(self.scores).sum(0) - without @ self.scores
        found: dict[str, Array] = {"margin": margin, "correct": (margin > 0) * 1.0, "loss": -margin}
        return found[target]


@frozen(eq=False)
class OneTarget:
    """A retraining that measures the loss alone, by a name of one's own; less of it is better.

    Args:
        retraining: That measures the loss.
    """

    retraining: LeastSquares
    targets: Mapping[str, bool] = {"regret": False}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.retraining, name)

    def measure(self, state: Mapping[str, Any]) -> Mapping[str, Array]:
        """Return the loss of every test."""
        return {"regret": self.retraining.measure(state)["loss"]}


@frozen(eq=False)
class OneOutcome:
    """The `Outcomes` of the loss, by a name of one's own."""

    known: Any

    def outcomes(self, counterfactuals: Sequence[Counterfactual], target: str) -> Array:
        """Return the losses ``[k, n_test]``; any other target is not measured."""
        losses: Array = self.known.outcomes(counterfactuals, {"regret": "loss"}[target])
        return losses


def _asks_no_models(bench: MetricBench) -> str | None:
    return None if "retraining" in bench.part.needs else "it asks for no retrained model"


def _judges_by_truth(bench: MetricBench) -> str | None:
    return "it compares a method with itself" if "attribute" in bench.part.needs else None


@law("metric", _asks_no_models, _judges_by_truth)
def scores_that_add_up_are_judged_best(bench: MetricBench) -> None:
    """Where outcomes are sums of scores over train sets, no random scores are judged better."""
    scores = bench.informed().scores
    sums = SumsOfScores(scores)
    found = bench.part.measure(evolve(bench.informed(), outcomes=sums))
    good = 1.0 if found.higher_is_better else -1.0
    draws = [evolve(bench.uninformed(seed), outcomes=sums) for seed in range(DRAWS)]
    values = [bench.part.measure(one).value for one in draws]
    best = good * max(good * value for value in values)
    require(
        good * (found.value - best) >= -TOLERANCE,
        f"scores that outcomes are the sums of have {found.value}, the best of {DRAWS} random ones "
        f"{best}; pair each test, and each train set, with the outcomes of its own",
    )


@law("metric", _asks_no_models, _judges_by_truth)
def direction_of_the_target_is_heeded(bench: MetricBench) -> None:
    """In a world that measures the loss, less of it is better: influence is still judged so."""
    # A metric that asks for another target refuses the world by an `InputError`.
    found, turned = (_measured_on_losses(bench, sign) for sign in (1.0, -1.0))
    good = 1.0 if found.higher_is_better else -1.0
    require(
        good * (found.value - turned.value) > 0,
        f"where the world's target is a loss, influence has {found.value}, minus it "
        f"{turned.value}; turn outcomes whose world.retraining.targets[world.target] is False",
    )


def _measured_on_losses(bench: MetricBench, sign: float) -> MetricResult:
    """Return what it says of influence on the loss, which is that on the margin times p's slope."""
    at = bench.evaluated
    whole = Counterfactual(np.ones(N_TRAIN, dtype=bool))
    (margins,) = at.outcomes.outcomes([whole], "margin")
    evidence = bench.informed(sign / (1 + np.exp(margins)))
    world = evolve(evidence.world, retraining=OneTarget(at.retraining), target="regret")
    on_losses = evolve(evidence, world=world, outcomes=OneOutcome(at.outcomes))
    measure: Callable[[Evidence], MetricResult] = bench.part.measure
    try:
        return measure(on_losses)
    except InputError as error:
        raise NotApplicable(f"it refuses a world that measures the loss alone: {error}") from None
    except KeyError as error:
        require(
            False,
            f"it asks for the target {error}, which the world does not measure; ask for "
            "world.target, or raise an InputError unless it is in world.retraining.targets",
        )
        raise
