"""Removal and insertion curves: what becomes of the model without the best examples, or with them.

Train examples are ordered by their mean score over the test set, most helpful first.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from attrs import frozen

from dattri_core import Counterfactual, Evidence, InputError, MetricResult
from dattri_metrics.arrays import flag, numbers
from dattri_metrics.bootstrap import DEFAULT, Bootstrap, summary
from dattri_metrics.evidence import goodness, other_seed, outcomes_of, scores_of
from dattri_metrics.spread import Estimate

Array = np.ndarray[Any, Any]
Kind = Literal["removal", "insertion"]


@frozen(eq=False)
class Curve:
    """How good models are along a curve, and along that of random order; made by `curve`.

    Args:
        kind: ``"removal"``: a share of the train set, the most helpful examples, was left out;
            ``"insertion"``: only that share was trained on.
        shares: ``[q]``, rising.
        goodness: ``[q, r, n_test]`` of r trainings with different seeds, more is better.
        control: ``[q, o, n_test]`` of o random orders.
    """

    kind: Kind
    shares: Array
    goodness: Array
    control: Array

    @property
    def mean(self) -> Array:
        """Return the curve: the mean goodness at each share, ``[q]``."""
        found: Array = self.goodness.mean(axis=(1, 2))
        return found

    @property
    def control_mean(self) -> Array:
        """Return the curve of random order, ``[q]``."""
        found: Array = self.control.mean(axis=(1, 2))
        return found

    def area(self, bootstrap: Bootstrap = DEFAULT) -> MetricResult:
        """Return the mean height of the curve, the area under it over its width.

            A = integral of goodness d(share) / (last share - first share), by straight lines

        in units of the target. Removal is good when the curve falls fast: less is better. For
        insertion more is better. The interval is over tests *and*, where there are several, over
        trainings: with one it says nothing of others, and with one test and one training it is the
        value itself. Chance is the area of random order (Ghorbani and Zou 2019, arXiv 1904.02868,
        figure 2; Hooker et al. 2019).

        Args:
            bootstrap: How to draw the interval.
        """
        areas = _areas(self.shares, self.goodness)
        values = areas.mean(axis=0)
        return summary(
            Estimate(values, areas - values),
            float(_areas(self.shares, self.control).mean()),
            bootstrap,
            higher_is_better=self.kind == "insertion",
            per_test=True,
        )


def _areas(shares: Array, heights: Array) -> Array:
    """Return the mean height of each curve, ``[r, n_test]``."""
    steps = np.diff(shares)[:, None, None]
    areas: Array = (steps * (heights[1:] + heights[:-1]) / 2).sum(axis=0)
    return areas / float(shares[-1] - shares[0])


def curve(kind: Kind, shares: Any, outcomes: Any, control: Any, *, higher_is_better: bool) -> Curve:
    """Return a removal or insertion curve from outcomes of retrained models.

    Args:
        kind: ``"removal"`` or ``"insertion"``.
        shares: ``[q]``, rising: of the train set, removed or kept.
        outcomes: ``[q, r, n_test]``, of r trainings with different seeds.
        control: ``[q, o, n_test]``, the same for o random orders.
        higher_is_better: Of the outcome: False for a loss.

    Raises:
        InputError: Shapes do not match, a number is not finite, or shares do not rise.
    """
    name = f"{kind}-curve"
    if kind not in ("removal", "insertion"):
        raise InputError(f"curve: kind is {kind!r}; expected 'removal' or 'insertion'")
    at = numbers(name, "shares", shares, ("q",))
    found = numbers(name, "outcomes", outcomes, ("q", "r", "n_test"))
    other = numbers(name, "control", control, ("q", "o", "n_test"))
    _check_shares(name, kind, at)
    if not len(at) == len(found) == len(other) or found.shape[2] != other.shape[2]:
        raise InputError(
            f"{name}: shares {at.shape}, outcomes {found.shape}, control {other.shape}; expected "
            "[q], [q, r, n_test] and [q, o, n_test]"
        )
    better = flag(name, "higher_is_better", higher_is_better)
    return Curve(kind, at, *((found, other) if better else (-found, -other)))


def _check_shares(name: str, kind: Kind, shares: Array) -> None:
    inside = (shares[0] >= 0, shares[-1] < 1) if kind == "removal" else (shares[0] > 0,)
    if len(shares) < 2 or not (np.diff(shares) > 0).all() or shares[-1] > 1 or not all(inside):
        raise InputError(
            f"{name}: shares are {shares.tolist()}; give two or more that rise, from 0 to under 1 "
            "to remove, from over 0 to 1 to insert"
        )


def _retrained(
    kind: Kind, evidence: Evidence, shares: tuple[float, ...], repeats: int, orders: int
) -> Curve:
    name = f"{kind}-curve"
    scores = scores_of(name, evidence)
    outcomes_of(name, evidence)
    at = numbers(name, "shares", shares, ("q",))
    _check_shares(name, kind, at)
    n, seed = len(scores), evidence.seed
    if repeats < 1 or orders < 1:
        raise InputError(f"{name}: repeats is {repeats} and orders {orders}; give 1 or more")
    best = [(np.argsort(-scores.mean(axis=1), kind="stable"), k) for k in range(repeats)]
    control = [(np.random.default_rng([seed, 3, k]).permutation(n), k) for k in range(orders)]
    plan = []
    for order, k in (*best, *control):
        for share in at:
            mask = np.full(n, kind == "removal")
            mask[order[: round(share * n)]] = kind == "insertion"
            plan.append(Counterfactual(mask, other_seed(seed, k)))
    found = goodness(name, evidence, plan).reshape(len(best) + orders, len(at), -1)
    found = found.swapaxes(0, 1)
    return curve(kind, at, found[:, :repeats], found[:, repeats:], higher_is_better=True)


@frozen
class RemovalCurve:
    """Removes the most helpful examples and trains again; see `Curve.area`.

    Args:
        shares: Of the train set, removed.
        repeats: Trainings at each share, with different seeds.
        orders: Random orders, for chance.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"retraining"})
    shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    repeats: int = 1
    orders: int = 1

    def curve(self, evidence: Evidence) -> Curve:
        """Return the curve itself."""
        return _retrained("removal", evidence, self.shares, self.repeats, self.orders)

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return its mean height with its interval; less is better."""
        return self.curve(evidence).area(Bootstrap(seed=evidence.seed))


@frozen
class InsertionCurve:
    """Trains on the most helpful examples only; see `Curve.area`.

    Args:
        shares: Of the train set, kept.
        repeats: Trainings at each share, with different seeds.
        orders: Random orders, for chance.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"retraining"})
    shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    repeats: int = 1
    orders: int = 1

    def curve(self, evidence: Evidence) -> Curve:
        """Return the curve itself."""
        return _retrained("insertion", evidence, self.shares, self.repeats, self.orders)

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return its mean height with its interval; more is better."""
        return self.curve(evidence).area(Bootstrap(seed=evidence.seed))
