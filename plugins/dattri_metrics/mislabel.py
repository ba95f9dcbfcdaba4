"""Mislabel detection: how well a suspicion ranks wrongly labelled train examples first.

Other libraries call three numbers "mislabel AUC": the area under the ROC curve, the area under the
inspection curve, and an F1 score. Here each has its own name.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from attrs import frozen

from dattri_core import Evidence, InputError, MetricResult
from dattri_metrics.arrays import numbers, truths
from dattri_metrics.bootstrap import DEFAULT, Bootstrap, summary
from dattri_metrics.evidence import scores_of
from dattri_metrics.intervals import Proportion
from dattri_metrics.precision import expected_precision, precisions
from dattri_metrics.spread import Estimate

Array = np.ndarray[Any, Any]
By = Literal["either", "self-influence", "scores"]
CHANCE = 0.5
CONSTANT = 1e-5  # of the largest: numbers of float32 that differ by less are ties
UNIT = (0.0, 1.0)


def auroc(suspicion: Any, is_mislabelled: Any, *, bootstrap: Bootstrap = DEFAULT) -> MetricResult:
    """Return the area under the ROC curve of finding mislabelled train examples.

    The chance that a mislabelled example is more suspicious than a correctly labelled one, ties
    counted half:

        AUROC = (sum of the ranks of the mislabelled - p (p + 1) / 2) / (p q)

    with p mislabelled and q correct examples and mid-ranks for ties (Mann and Whitney 1947), in
    O(n log n). The interval is over train examples: `dattri_metrics.intervals.Proportion` with
    DeLong's variance and `trials_of_pairs`.

    **Direction.** High suspicion means "look here first". The field's suspicion is self-influence
    as it is (high: the example is explained by itself only; Koh and Liang 2017, section 5.4, and
    Pruthi et al. 2020, arXiv 2002.08484, section 4.1). Of scores for a clean test set it is *minus*
    their mean (low: the example harms).

    Args:
        suspicion: ``[n]`` finite numbers.
        is_mislabelled: ``[n]`` true where the label is wrong.
        bootstrap: The confidence of the interval.

    Returns:
        Value and interval in [0, 1]; chance level 0.5.

    Raises:
        InputError: Lengths differ, a number is not finite, or one of the two groups is empty.
    """
    numbers_, wrong = _checked("mislabel-auroc", suspicion, is_mislabelled)
    correct, mislabelled = np.sort(numbers_[~wrong]), np.sort(numbers_[wrong])
    p, q = len(mislabelled), len(correct)
    won = _half_below(correct, mislabelled)
    value = float(won.sum() / (p * q))
    beaten = p - _half_below(mislabelled, correct)  # by how many mislabelled ones
    moves = np.concatenate([won / q - value, beaten / p - value])
    moves *= np.concatenate([np.full(p, (p + q) / p), np.full(q, (p + q) / q)])
    estimate = Estimate(np.array([value]), moves[:, None], np.arange(p + q) < p)
    shape = Proportion(trials_of_pairs(value, p, q))
    return summary(estimate, CHANCE, bootstrap, shape=shape, bounds=UNIT)


def trials_of_pairs(area: float, p: int, q: int) -> float:
    """Return how many values of 0 and 1 are as uncertain as an area from p x q pairs.

        p q / (1 + N (1 - A) / (2 - A) + N A / (1 + A)), with N = (p + q) / 2 - 1,

    by exponential suspicions of both groups, with the two exchanged in half of the cases (Hanley
    and McNeil 1982; Newcombe 2006, part 2, method 5).
    """
    wide = (p + q) / 2 - 1
    return p * q / (1 + wide * ((1 - area) / (2 - area) + area / (1 + area)))


def average_precision(
    suspicion: Any, is_mislabelled: Any, *, bootstrap: Bootstrap = DEFAULT
) -> MetricResult:
    """Return the average precision of finding mislabelled train examples.

        AP = (1 / p) sum over mislabelled i of T_i / N_i,

    N_i the number of examples that are at least as suspicious as i, T_i the mislabelled among them.

    Examples are looked at by falling suspicion. Equal ones are looked at together: the precision is
    that after the whole group, as in scikit-learn's ``average_precision_score``. The interval is
    over train examples: `dattri_metrics.intervals.Proportion`, a trial for each mislabelled one.

    Args:
        suspicion: ``[n]`` finite numbers, high first; see `auroc` for the direction.
        is_mislabelled: ``[n]`` true where the label is wrong.
        bootstrap: The confidence of the interval.

    Returns:
        Value and interval in [0, 1]; chance is the exact mean over random orders, a little above
        the share of mislabelled examples.

    Raises:
        InputError: As `auroc`.
    """
    numbers_, wrong = _checked("mislabel-average-precision", suspicion, is_mislabelled)
    found = precisions(numbers_[:, None], wrong[:, None], wrong)
    chance = float(expected_precision(len(wrong), wrong.sum()))
    shape = Proportion(float(wrong.sum()))
    return summary(found, chance, bootstrap, shape=shape, bounds=UNIT)


def inspection_area(
    suspicion: Any, is_mislabelled: Any, *, bootstrap: Bootstrap = DEFAULT
) -> MetricResult:
    """Return the area under the inspection curve.

    Examples are looked at by falling suspicion; the curve is the share of the mislabelled ones that
    was found (y) after a share of all examples was looked at (x), from (0, 0) to (1, 1) by straight
    lines (Koh and Liang 2017, arXiv 1703.04730, figure 6). Its area is

        A = (mean rank of the mislabelled - 1/2) / n = (1 - pi) AUROC + pi / 2,

    ranks by rising suspicion, mid-ranks for ties, pi the share of mislabelled examples. The
    interval is over train examples.

    Args:
        suspicion: ``[n]`` finite numbers, high first; see `auroc` for the direction.
        is_mislabelled: ``[n]`` true where the label is wrong.
        bootstrap: The confidence of the interval.

    Returns:
        Value and interval in [0, 1]; chance 0.5. The best order reaches 1 - pi / 2, the ceiling.

    Raises:
        InputError: As `auroc`.
    """
    numbers_, wrong = _checked("mislabel-inspection-area", suspicion, is_mislabelled)
    everyone, mislabelled = np.sort(numbers_), np.sort(numbers_[wrong])
    n, p = len(everyone), len(mislabelled)
    won = _half_below(everyone, mislabelled) / n
    value = float(won.mean())
    moves = 1 - _half_below(mislabelled, numbers_) / p - value
    moves[wrong] += n / p * (_half_below(everyone, numbers_[wrong]) / n - value)
    # on its way from the worst order to the best it is the AUROC
    worst, best = p / n / 2, 1 - p / n / 2
    area = min(max((value - worst) / (best - worst), 0.0), 1.0)
    return summary(
        Estimate(np.array([value]), moves[:, None], wrong),
        CHANCE,
        bootstrap,
        shape=Proportion(trials_of_pairs(area, p, n - p), worst, best),
        bounds=UNIT,
        ceiling=best,
    )


def _half_below(ascending: Array, values: Array) -> Array:
    """Return how many of ``ascending`` are below each value, equal ones counted half."""
    below = np.searchsorted(ascending, values, side="left")
    upto = np.searchsorted(ascending, values, side="right")
    counts: Array = (below + upto) / 2
    return counts


def _checked(metric: str, suspicion: Any, is_mislabelled: Any) -> tuple[Array, Array]:
    scores = numbers(metric, "suspicion", suspicion, ("n",))
    wrong = truths(metric, "is_mislabelled", is_mislabelled, ("n",))
    if scores.shape != wrong.shape:
        raise InputError(
            f"{metric}: suspicion has shape {scores.shape} and is_mislabelled {wrong.shape}; "
            "expected one number and one truth value for each train example, [n] and [n]"
        )
    if wrong.all() or not wrong.any():
        raise InputError(
            f"{metric}: {int(wrong.sum())} of {len(wrong)} examples are mislabelled; at "
            "least one mislabelled and one correct example are needed"
        )
    return scores, wrong


def _suspicion(metric: str, evidence: Evidence, by: By) -> Array:
    """Return self-influence, or minus the mean score; ``[n_train]``.

    Self-influence that differs by rounding only, as the cosine of a row with itself does, is none:
    the order of rounding errors is not a ranking.
    """
    own = evidence.self_influence
    if by == "scores" or (by == "either" and (own is None or _is_constant(metric, own))):
        return np.asarray(-scores_of(metric, evidence).mean(axis=1))
    if own is None:
        raise InputError(
            f"{metric}: the method gives no score of an example for itself; "
            "take by='scores', minus the mean score for the test set"
        )
    found = numbers(metric, "self_influence", own, ("n_train",))
    return np.ones_like(found) if _is_constant(metric, found) else found


def _is_constant(metric: str, values: Array) -> bool:
    found = numbers(metric, "self_influence", values, ("n_train",))
    return bool(np.ptp(found) <= CONSTANT * np.abs(found).max())


def _needs(by: By) -> frozenset[str]:
    return frozenset({"mislabelled"} | ({"self-influence"} if by == "self-influence" else set()))


@frozen
class MislabelAuroc:
    """AUROC of finding wrong labels; see `auroc`.

    Args:
        by: The suspicion. ``"self-influence"``; ``"scores"``: minus the mean score for the test
            set; ``"either"``: self-influence where the method has it and it tells examples apart,
            else minus the mean score.
    """

    by: By = "either"

    @property
    def needs(self) -> frozenset[str]:
        """Return what evidence it reads: self-influence where nothing may stand in for it."""
        return _needs(self.by)

    def of(self, suspicion: Any, is_mislabelled: Any, seed: int = 0) -> MetricResult:
        """Return it for a suspicion ``[n]`` that is at hand, high first."""
        return auroc(suspicion, is_mislabelled, bootstrap=Bootstrap(seed=seed))

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the area with its interval."""
        suspicion = _suspicion("mislabel-auroc", evidence, self.by)
        return self.of(suspicion, evidence.world.flipped, evidence.seed)


@frozen
class MislabelAveragePrecision:
    """Average precision of finding wrong labels; see `average_precision`.

    Args:
        by: The suspicion, as in `MislabelAuroc`.
    """

    by: By = "either"

    @property
    def needs(self) -> frozenset[str]:
        """Return what evidence it reads: self-influence where nothing may stand in for it."""
        return _needs(self.by)

    def of(self, suspicion: Any, is_mislabelled: Any, seed: int = 0) -> MetricResult:
        """Return it for a suspicion ``[n]`` that is at hand, high first."""
        return average_precision(suspicion, is_mislabelled, bootstrap=Bootstrap(seed=seed))

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the average precision with its interval."""
        suspicion = _suspicion("mislabel-average-precision", evidence, self.by)
        return self.of(suspicion, evidence.world.flipped, evidence.seed)


@frozen
class MislabelInspectionArea:
    """Area under the inspection curve of finding wrong labels; see `inspection_area`.

    Args:
        by: The suspicion, as in `MislabelAuroc`.
    """

    by: By = "either"

    @property
    def needs(self) -> frozenset[str]:
        """Return what evidence it reads: self-influence where nothing may stand in for it."""
        return _needs(self.by)

    def of(self, suspicion: Any, is_mislabelled: Any, seed: int = 0) -> MetricResult:
        """Return it for a suspicion ``[n]`` that is at hand, high first."""
        return inspection_area(suspicion, is_mislabelled, bootstrap=Bootstrap(seed=seed))

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the area with its interval."""
        suspicion = _suspicion("mislabel-inspection-area", evidence, self.by)
        return self.of(suspicion, evidence.world.flipped, evidence.seed)
