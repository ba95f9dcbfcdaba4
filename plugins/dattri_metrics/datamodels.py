"""LDS: whether scores predict how models trained on random subsets do."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from attrs import frozen
from dattri_parts.training import random_subsets

from dattri_core import Counterfactual, Evidence, InputError, MetricResult
from dattri_metrics.arrays import flag, numbers, same_shape, truths
from dattri_metrics.bootstrap import DEFAULT, Bootstrap, summary
from dattri_metrics.correlation import ceiling, correlate
from dattri_metrics.evidence import goodness, other_seed, outcomes_of, scores_of
from dattri_metrics.ids import ordered
from dattri_metrics.intervals import Correlation

Array = np.ndarray[Any, Any]
NAME = "lds"
DIGITS = 12


def lds(
    scores: Any,
    masks: Any,
    outcomes: Any,
    *,
    higher_is_better: bool,
    again: Any = None,
    train_ids: Any = None,
    test_ids: Any = None,
    bootstrap: Bootstrap = DEFAULT,
) -> MetricResult:
    """Return the linear datamodeling score.

    For each test j, over random train sets S_1 ... S_r, the rank correlation of the sum of scores
    and of how well the model trained on the set does; then the mean over tests:

        LDS = mean_j spearman_s(sum over i in S_s of tau_ij, goodness_sj)

    (Park et al. 2023, TRAK, arXiv 2303.14186, definition 2.3). Goodness is the outcome, or minus
    the outcome where less is better: tau > 0 means that the example helps. Sums are rounded to
    1e-12 of sum_i |tau_ij|, so that sums that are equal but for rounding are ties.

    The interval is of the mean over tests *and* subsets of the two populations that they were drawn
    from; see `dattri_metrics.spread.spread`, `dattri_metrics.intervals.Correlation` for how, and
    `dattri_metrics.bootstrap.summary` for why subsets are not simply resampled.
    A test whose outcome is the same for all subsets is left out; one whose sums are all the same
    counts 0 (`dattri_metrics.correlation.correlate`).

    Args:
        scores: tau, ``[n_train, n_test]``, positive where the train example helps.
        masks: ``[r, n_train]`` truth values: which examples each model was trained on.
        outcomes: ``[r, n_test]``: of each model on each test example, a loss say.
        higher_is_better: Of the outcome: False for a loss.
        again: ``[r, n_test]``, outcomes of other trainings on the same sets, for the ceiling.
        train_ids: Of the columns of ``masks``, for `Scores` with ids of their own.
        test_ids: Of the columns of ``outcomes``.
        bootstrap: The confidence of the interval.

    Returns:
        Value in [-1, 1]; chance 0; the ceiling is sqrt(mean_j spearman_s(outcomes, again)).

    Raises:
        InputError: Shapes do not match, a number is not finite, there are fewer than 3 subsets, all
            subsets are one, or no outcome varies.
    """
    better = flag(NAME, "higher_is_better", higher_is_better)
    scores = ordered(NAME, scores, "masks and outcomes", train_ids, test_ids)
    tau = numbers(NAME, "scores", scores, ("n_train", "n_test"))
    sets = truths(NAME, "masks", masks, ("r", "n_train"))
    truth = numbers(NAME, "outcomes", outcomes, ("r", "n_test"))
    if sets.shape != (len(truth), len(tau)) or truth.shape[1] != tau.shape[1]:
        raise InputError(
            f"lds: scores {tau.shape}, masks {sets.shape}, outcomes {truth.shape}; expected "
            "[n_train, n_test], [r, n_train] and [r, n_test]"
        )
    if (sets == sets[0]).all():
        raise InputError(f"lds: all {len(sets)} masks are the same; give different train sets")
    best = None
    if again is not None:
        second = numbers(NAME, "again", again, ("r", "n_test"))
        same_shape(NAME, outcomes=truth, again=second)
        best = ceiling(NAME, "spearman", truth, second)
    found = correlate(NAME, "spearman", _sums(tau, sets), truth if better else -truth)
    return summary(
        found,
        0.0,
        bootstrap,
        shape=Correlation(len(sets), ranks=True),
        bounds=(-1.0, 1.0),
        ceiling=best,
        per_test=True,
    )


def _sums(scores: Array, masks: Array) -> Array:
    """Return the sum of scores over each set, over that of all absolute scores, ``[r, m]``."""
    scale = np.abs(scores).sum(axis=0)
    sums = masks.astype(np.float64) @ scores
    rounded: Array = np.round(sums / np.where(scale > 0, scale, 1.0), DIGITS)
    return rounded


@frozen
class LinearDatamodelingScore:
    """LDS of models that are trained on random subsets; see `lds`.

    Args:
        subsets: r, models to train.
        fraction: Of the train set that each subset holds.
        ceiling: Train on every subset a second time, with another seed, for the noise ceiling.
        one_seed: Train every model with the seed of the evidence, in ``dattri bench`` that of the
            attributed model, so that all begin at its weights: what differs is the train set, and
            with it the order of examples, but not the start. By default each has a seed of its
            own, as in Park et al. 2023.

    Raises:
        InputError: A ceiling of one seed is asked for; there is no second training to compare with.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"retraining"})
    subsets: int = 50
    fraction: float = 0.5
    ceiling: bool = False
    one_seed: bool = False

    def __attrs_post_init__(self) -> None:
        if self.ceiling and self.one_seed:
            raise InputError(
                "lds: ceiling=true trains every subset again with another seed, and one_seed=true "
                "allows one; give one of the two"
            )

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the score with its interval."""
        scores = scores_of(NAME, evidence)
        outcomes_of(NAME, evidence)
        plan = random_subsets(len(scores), self.subsets, fraction=self.fraction, seed=evidence.seed)
        if self.one_seed:
            plan = [Counterfactual(c.mask, evidence.seed) for c in plan]
        second = [Counterfactual(c.mask, other_seed(c.seed, 1)) for c in plan]
        truth = goodness(NAME, evidence, [*plan, *second] if self.ceiling else plan)
        return lds(
            scores,
            np.stack([c.mask for c in plan]),
            truth[: len(plan)],
            higher_is_better=True,
            again=truth[len(plan) :] if self.ceiling else None,
            bootstrap=Bootstrap(seed=evidence.seed),
        )
