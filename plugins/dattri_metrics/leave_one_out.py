"""Leave-one-out correlation: whether scores predict what removing one example does."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from attrs import frozen
from dattri_parts.training import leave_one_out

from dattri_core import Counterfactual, Evidence, InputError, MetricResult, Scores
from dattri_metrics.arrays import flag, numbers, same_shape
from dattri_metrics.bootstrap import DEFAULT, Bootstrap, summary
from dattri_metrics.correlation import KINDS, Kind, ceiling, correlate
from dattri_metrics.evidence import goodness, other_seed, outcomes_of, scores_of
from dattri_metrics.ids import ordered, ordered_with
from dattri_metrics.intervals import Correlation

Array = np.ndarray[Any, Any]


def loo_correlation(
    scores: Any,
    outcomes: Any,
    *,
    higher_is_better: bool,
    correlation: Kind = "pearson",
    again: Any = None,
    train_ids: Any = None,
    test_ids: Any = None,
    bootstrap: Bootstrap = DEFAULT,
) -> MetricResult:
    """Return the correlation of scores with what leaving one example out does.

    For each test j, over train examples i; then the mean over tests:

        mean_j corr_i(tau_ij, goodness_j - goodness_j without i)

    Goodness is the outcome, or minus the outcome where less is better. That of the model trained on
    everything is the same for all i and drops out of the correlation, so it is not asked for
    (Koh and Liang 2017, arXiv 1703.04730, section 4.1; Basu et al. 2021, arXiv 2006.14651).

    The interval is over tests *and* train examples. A test whose outcome never varies is left out;
    one whose scores are all the same counts 0.

    Args:
        scores: tau, ``[n, n_test]``, of the examples that were left out.
        outcomes: ``[n, n_test]``: row i of the model that was trained without example i.
        higher_is_better: Of the outcome: False for a loss.
        correlation: ``"pearson"`` or ``"spearman"``; two metrics, not to be compared.
        again: ``[n, n_test]``, outcomes of other trainings on the same sets, for the ceiling.
        train_ids: Of the rows of ``outcomes``, for `Scores` with ids of their own; they may be
            some of those of the scores.
        test_ids: Of the columns of ``outcomes``.
        bootstrap: The confidence of the interval.

    Returns:
        Value in [-1, 1]; chance 0; the ceiling is sqrt(mean_j corr_i(outcomes, again)).

    Raises:
        InputError: Shapes do not match, a number is not finite, there are fewer than 3 examples, no
            outcome varies, or an argument is none of those that are allowed.
    """
    if correlation not in KINDS:
        raise InputError(
            f"loo-correlation: correlation is {correlation!r}; give 'pearson' or 'spearman'"
        )
    name = f"loo-{correlation}"
    better = flag(name, "higher_is_better", higher_is_better)
    if isinstance(outcomes, Scores) and train_ids is None and test_ids is None:
        ordered_with(name, "outcomes", scores, outcomes)
    else:
        scores = ordered(name, scores, "outcomes", train_ids, test_ids)
    tau = numbers(name, "scores", scores, ("n", "n_test"))
    truth = numbers(name, "outcomes", outcomes, ("n", "n_test"))
    same_shape(name, scores=tau, outcomes=truth)
    best = None
    if again is not None:
        second = numbers(name, "again", again, ("n", "n_test"))
        same_shape(name, outcomes=truth, again=second)
        best = ceiling(name, correlation, truth, second)
    found = correlate(name, correlation, tau, -truth if better else truth)
    return summary(
        found,
        0.0,
        bootstrap,
        shape=Correlation(len(tau), ranks=correlation == "spearman"),
        bounds=(-1.0, 1.0),
        ceiling=best,
        per_test=True,
    )


def _measure(
    correlation: Kind, evidence: Evidence, examples: int | None, with_ceiling: bool
) -> MetricResult:
    name = f"loo-{correlation}"
    scores = scores_of(name, evidence)
    outcomes_of(name, evidence)
    left_out = chosen(name, len(scores), examples, evidence.seed)
    plan = leave_one_out(len(scores), seed=evidence.seed, indices=left_out)
    second = [Counterfactual(c.mask, other_seed(c.seed, 1)) for c in plan] if with_ceiling else []
    truth = goodness(name, evidence, [*plan, *second])
    return loo_correlation(
        scores[left_out],
        truth[: len(plan)],
        higher_is_better=True,
        correlation=correlation,
        again=truth[len(plan) :] if with_ceiling else None,
        bootstrap=Bootstrap(seed=evidence.seed),
    )


def chosen(metric: str, n: int, examples: int | None, seed: int) -> list[int]:
    """Return which examples are left out, in ascending order.

    Raises:
        InputError: There are not so many.
    """
    if examples is None:
        return list(range(n))
    if not 3 <= examples <= n:
        raise InputError(f"{metric}: examples is {examples} of {n}; give 3 to {n}, or None for all")
    drawn = np.random.default_rng([seed, 2]).permutation(n)[:examples]
    return [int(i) for i in np.sort(drawn)]


@frozen
class LeaveOneOutPearson:
    """Pearson correlation with leaving one example out; see `loo_correlation`.

    Args:
        examples: How many, drawn at random, are left out in turn; None: each of the train set.
        ceiling: Train every model a second time, with another seed, for the noise ceiling.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"retraining"})
    examples: int | None = None
    ceiling: bool = False

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the correlation with its interval."""
        return _measure("pearson", evidence, self.examples, self.ceiling)


@frozen
class LeaveOneOutSpearman:
    """Spearman correlation with leaving one example out; see `loo_correlation`.

    Args:
        examples: How many, drawn at random, are left out in turn; None: each of the train set.
        ceiling: Train every model a second time, with another seed, for the noise ceiling.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"retraining"})
    examples: int | None = None
    ceiling: bool = False

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the correlation with its interval."""
        return _measure("spearman", evidence, self.examples, self.ceiling)
