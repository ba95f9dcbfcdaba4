"""Brittleness: the fewest train examples whose removal flips a prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from attrs import frozen
from scipy import stats

from dattri_core import Counterfactual, Evidence, InputError, MetricResult
from dattri_metrics.arrays import numbers, truths
from dattri_metrics.bootstrap import DEFAULT, Bootstrap, summary
from dattri_metrics.evidence import goodness, other_seed, outcomes_of, scores_of
from dattri_metrics.ids import ordered_with
from dattri_metrics.intervals import Proportion
from dattri_metrics.spread import Estimate

Array = np.ndarray[Any, Any]
NAME = "brittleness"
Flips = Callable[[Array, Array], Array]
"""``(masks [t, n_train], tests [t]) -> [t]``: is test t wrong after training on mask t."""


def smallest_removals(scores: Any, flips: Flips, largest: int) -> Array:
    """Return the fewest most helpful examples whose removal flips each test.

    By bisection: k examples with the highest scores are removed together, equal scores in the order
    of the train set. First ``largest``; where that flips, the interval (does not flip, flips) is
    halved to the end, in about log2(largest) rounds of retraining. The k that is found flips and
    k - 1 does not; it is the smallest of all where more removals never flip back.

    Args:
        scores: ``[n_train, n_test]``, of tests that the model of the whole train set gets right.
        flips: Trains and looks; called with all tests of a round at once.
        largest: Removals that are tried at most, from 1 to n_train - 1.

    Returns:
        ``[n_test]``, from 1 to ``largest``; ``largest + 1`` where that many do not flip.

    Raises:
        InputError: A number is not finite, or ``largest`` is out of range.
    """
    ordered_with(NAME, "masks", scores, None)
    tau = numbers(NAME, "scores", scores, ("n_train", "n_test"))
    n, m = tau.shape
    if not 1 <= largest < n:
        raise InputError(f"brittleness: largest is {largest} of {n} examples; give 1 to {n - 1}")
    order = np.argsort(-tau, axis=0, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(n)[:, None], axis=0)

    def flipped(tests: Array, sizes: Array) -> Array:
        kept = sizes[:, None] <= place[:, tests].T
        found = truths(NAME, "flips(...)", flips(kept, tests), ("t",))
        if found.shape != tests.shape:
            raise InputError(
                f"brittleness: flips gave {found.shape} for {len(tests)} tests; expected one truth "
                "value for each"
            )
        return found

    low, high = np.zeros(m, dtype=int), np.full(m, largest)
    everyone = np.arange(m)
    high[~flipped(everyone, high)] += 1
    low[high > largest] = largest
    while (open_ := np.flatnonzero(high - low > 1)).size:
        middle = (low[open_] + high[open_]) // 2
        hit = flipped(open_, middle)
        high[open_[hit]] = middle[hit]
        low[open_[~hit]] = middle[~hit]
    return high


def brittleness(
    smallest: Any, control: Any, *, largest: int, bootstrap: Bootstrap = DEFAULT
) -> MetricResult:
    """Return the median over tests of the smallest removal that flips, in examples.

    Less is better: the scores find the few examples that a prediction rests on (Ilyas et al. 2022,
    Datamodels, arXiv 2202.00622, section 4.1; Bae et al. 2024, arXiv 2405.12186, section 5). A test
    that never flips counts ``largest + 1``: a median of at most ``largest`` is the same as with a
    longer search. The interval is the exact one of a median, between the l-th smallest and the l-th
    largest, l the largest number with P(Binomial(t, 1/2) < l) below half of 1 - confidence: at 95 %
    the smallest and the largest of 6 to 8 tests, and everything for fewer.

    Args:
        smallest: ``[t]``, as `smallest_removals` gives.
        control: ``[t']``, the same with train examples in random order, for chance.
        largest: Removals that were tried.
        bootstrap: The confidence of the interval.

    Raises:
        InputError: A number is outside of 1 to ``largest + 1``.
    """
    found, random_order = (_removals(n, x, largest) for n, x in _named(smallest, control))
    place = int(stats.binom.ppf((1 - bootstrap.confidence) / 2, len(found), 0.5))
    # with few tests even the smallest and the largest are too near: the bounds instead
    ends = np.concatenate([[1.0], np.sort(found), [largest + 1.0]])
    return MetricResult(
        value=float(np.median(found)),
        low=float(ends[place]),
        high=float(ends[-1 - place]),
        chance=float(np.median(random_order)),
        confidence=bootstrap.confidence,
        higher_is_better=False,
        bounds=(1.0, largest + 1.0),
    )


def share_flipped(
    smallest: Any, control: Any, *, largest: int, bootstrap: Bootstrap = DEFAULT
) -> MetricResult:
    """Return the share of tests that at most ``largest`` removals flip; more is better.

    Args:
        smallest: ``[t]``, as `smallest_removals` gives.
        control: ``[t']``, the same with train examples in random order, for chance.
        largest: Removals that were tried.
        bootstrap: The confidence of the interval, Wilson's over tests.

    Raises:
        InputError: A number is outside of 1 to ``largest + 1``.
    """
    found, random_order = (_removals(n, x, largest) for n, x in _named(smallest, control))
    flipped = Estimate((found <= largest).astype(np.float64), None)
    chance = float((random_order <= largest).mean())
    shape = Proportion(len(found), most=True)
    return summary(flipped, chance, bootstrap, shape=shape, bounds=(0.0, 1.0))


def _named(smallest: Any, control: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return ("smallest", smallest), ("control", control)


def _removals(name: str, value: Any, largest: int) -> Array:
    found = numbers(NAME, name, value, ("t",))
    if found.min() < 1 or found.max() > largest + 1:
        raise InputError(
            f"brittleness: {name} holds {found.min():g} to {found.max():g} removals; expected 1 to "
            f"{largest}, or {largest + 1} where no prediction flipped"
        )
    return found


@frozen
class Brittleness:
    """Median smallest removal that flips a prediction, found by retraining; see `brittleness`.

    Args:
        tests: Test examples, drawn from those that the model gets right.
        largest: Share of the train set that is removed at most.
        repeats: Trainings with different seeds for each removal, the full train set included; a
            prediction counts as right where at least half of them are.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"retraining"})
    tests: int = 50
    largest: float = 0.5
    repeats: int = 1

    def search(self, evidence: Evidence) -> tuple[Array, Array, int]:
        """Return the smallest removals ``[t]``, those in random order, and how many were tried."""
        scores = scores_of(NAME, evidence)
        outcomes_of(NAME, evidence)
        n = len(scores)
        largest = max(1, round(self.largest * n))
        if self.tests < 1 or self.repeats < 1 or not 0 < self.largest < 1 or largest >= n:
            raise InputError(
                f"brittleness: got {self} for {n} train examples; give tests and repeats of 1 or "
                "more and a largest share between 0 and 1"
            )
        right = ~self._wrong(evidence, np.ones((1, n), dtype=bool))[0]
        if not right.any():
            raise InputError("brittleness: the model gets no test example right; none can flip")
        random = np.random.default_rng([evidence.seed, 4])
        tests = np.sort(random.permutation(np.flatnonzero(right))[: self.tests])

        def flips(masks: Array, which: Array) -> Array:
            return np.asarray(self._wrong(evidence, masks)[np.arange(len(which)), tests[which]])

        one_order = np.repeat(random.permutation(n).astype(float)[:, None], len(tests), axis=1)
        found = smallest_removals(scores[:, tests], flips, largest)
        return found, smallest_removals(one_order, flips, largest), largest

    def _wrong(self, evidence: Evidence, masks: Array) -> Array:
        """Return which tests models of these masks get wrong, ``[len(masks), n_test]``."""
        different, back = np.unique(masks, axis=0, return_inverse=True)
        seeds = [other_seed(evidence.seed, k) for k in range(self.repeats)]
        plan = [Counterfactual(mask, seed) for mask in different for seed in seeds]
        hits = goodness(NAME, evidence, plan, "correct").reshape(len(different), self.repeats, -1)
        wrong = hits.mean(axis=1) < 0.5
        return np.asarray(wrong[np.ravel(back)])

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the median with its interval; less is better."""
        found, control, largest = self.search(evidence)
        return brittleness(found, control, largest=largest, bootstrap=Bootstrap(seed=evidence.seed))


@frozen
class BrittlenessShare:
    """Share of predictions that the removal of ``largest`` examples flips; see `share_flipped`.

    Args:
        tests: Test examples, drawn from those that the model gets right.
        largest: Share of the train set that is removed.
        repeats: Trainings with different seeds for each removal, as in `Brittleness`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"retraining"})
    tests: int = 50
    largest: float = 0.1
    repeats: int = 1

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the share with its interval; more is better."""
        search = Brittleness(self.tests, self.largest, self.repeats)
        found, control, largest = search.search(evidence)
        return share_flipped(
            found, control, largest=largest, bootstrap=Bootstrap(seed=evidence.seed)
        )
