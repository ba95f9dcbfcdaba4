"""Laws of metrics that draw numbers: what they draw is of the seed of the evidence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from dattri_core.experiment import Evidence, MetricResult
from dattri_core.laws.evaluated import N_TEST, N_TRAIN
from dattri_core.laws.law import NotApplicable, law, require
from dattri_core.laws.metric_worlds import SIGNS
from dattri_core.laws.metrics import DRAWS, MetricBench

ORDERS = 3
"""Of the same examples, besides their own."""
FIELDS = ("value", "low", "high", "chance", "ceiling", "confidence", "per_test")
Numbers = dict[str, float | None]


@law("metric")
def what_is_drawn_is_of_the_seed(bench: MetricBench) -> None:
    """Generators, and numbers that show the order of examples, differ from seed to seed."""
    # A resample takes examples by their place: what it makes shows their order, or the seed.
    made = _generators_follow_the_seed(bench)
    want = _numbers(bench.part.measure(bench.informed(SIGNS)))
    shown = _shown_by_order(bench, want)
    if not made and not shown:
        raise NotApplicable("it makes no generator, and no number shows the order of examples")
    for seed in range(1, DRAWS):
        if not shown:
            return
        found = _numbers(bench.part.measure(bench.informed(SIGNS, seed=seed)))
        shown = {name: got for name, got in shown.items() if _alike(found[name], want[name])}
    for name, got in shown.items():
        require(
            False,
            f"{name} of the same examples in another order is {got}, not {want[name]}: it is drawn "
            f"by their place; but it is the same at each of {DRAWS} seeds; draw by "
            "np.random.default_rng(evidence.seed)",
        )


def _numbers(found: MetricResult) -> Numbers:
    """Return the numbers of a result by name, the ends of its interval from the value."""
    return {
        "value": found.value,
        "chance": found.chance,
        "value - low": found.value - found.low,
        "high - value": found.high - found.value,
        "ceiling": found.ceiling,
    }


def _alike(got: float | None, want: float | None) -> bool:
    if got is None or want is None:
        return got is want
    return math.isclose(got, want, rel_tol=1e-6, abs_tol=1e-9)


def _shown_by_order(bench: MetricBench, want: Numbers) -> Numbers:
    """Return the numbers that are others in another order of the examples, with what they are."""
    # Whether value and chance show the order is told by another law, but for the order of train
    # examples where models are trained again.
    shown: Numbers = {}
    random, tests = np.random.default_rng(1), np.arange(N_TEST)
    for _ in range(ORDERS):
        order, turn = random.permutation(N_TRAIN), random.permutation(N_TEST)
        turned = [(turn, set(want) - {"value", "chance"})]
        if "retraining" in bench.part.needs:
            turned.append((tests, set(want)))
        for test, names in turned:
            world = bench.evaluated.ordered(order, test)
            found = _numbers(bench.part.measure(bench.informed(SIGNS[test], evaluated=world)))
            shown |= {name: found[name] for name in names if not _alike(found[name], want[name])}
    return shown


def _generators_follow_the_seed(bench: MetricBench) -> int:
    """Return how many generators are made; raise `LawBroken` where one is the same at any seed."""
    made = []
    for seed in (0, 1, 2**31):
        with _generators() as states:
            bench.part.measure(bench.informed(SIGNS, seed=seed))
        made.append(states)
    for place, alike in enumerate(zip(*made, strict=False)):
        require(
            any(state != alike[0] for state in alike),
            f"generator {place + 1} of {len(made[0])} that measure makes by np.random.default_rng "
            "is in the same state for the seeds 0, 1 and 2^31; make it of evidence.seed",
        )
    return max(map(len, made))


@contextmanager
def _generators() -> Iterator[list[Any]]:
    """Yield the states of the generators that NumPy makes, as they are made."""
    states: list[Any] = []
    make = np.random.default_rng

    def noted(*args: Any, **kwargs: Any) -> np.random.Generator:
        made = make(*args, **kwargs)
        states.append(repr(made.bit_generator.state))
        return made

    with mock.patch.object(np.random, "default_rng", noted):
        yield states


@law("metric")
def seeds_are_repeatable(bench: MetricBench) -> None:
    """The same evidence with the same seed gives the same bits, after any other seed and scores."""
    seeds = (0, 1, 2**31)

    def evidence(seed: int) -> tuple[Evidence, ...]:
        return bench.informed(SIGNS, seed=seed), bench.uninformed(seed)

    first = {seed: [bench.part.measure(one) for one in evidence(seed)] for seed in seeds}
    for seed in reversed(seeds):
        for one, want in zip(evidence(seed), first[seed], strict=True):
            found = bench.part.measure(one)
            for name in FIELDS:
                got, was = getattr(found, name), getattr(want, name)
                require(
                    got == was,
                    f"{name} at seed {seed} is {got} where it was {was} before other seeds; make a "
                    "new generator of evidence.seed at each measure",
                )
