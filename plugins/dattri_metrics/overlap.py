"""Top-k overlap: whether two rankings name the same examples first."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from attrs import frozen
from dattri_parts.training import leave_one_out

from dattri_core import Evidence, MetricResult
from dattri_metrics.arrays import numbers, same_shape
from dattri_metrics.bootstrap import DEFAULT, Bootstrap, summary
from dattri_metrics.evidence import goodness, outcomes_of, scores_of
from dattri_metrics.ids import ordered_with
from dattri_metrics.intervals import Proportion
from dattri_metrics.spread import Estimate
from dattri_metrics.top import check_k, top

NAME = "top-k-overlap"


def top_k_overlap(
    scores: Any, others: Any, *, k: int = 10, bootstrap: Bootstrap = DEFAULT
) -> MetricResult:
    """Return the share of the k most helpful examples that two matrices of scores agree on.

        mean_j |top_k(tau_j) and top_k(other_j)| / k

    Ties at the last places are broken at random, independently on both sides, and the mean over
    that is returned: constant scores give chance exactly. The interval is over tests; a resampled
    train set has other top k's, so train examples are not resampled.

    Not "top-k cardinality", the number of different examples in the top k of all tests.

    Args:
        scores: ``[n_train, n_test]``.
        others: ``[n_train, n_test]``: of another method, or what leaving each example out does.
        k: From 1 to n_train - 1.
        bootstrap: The confidence of the interval, Wilson's.

    Returns:
        Value in [0, 1]; chance k / n_train.

    Raises:
        InputError: Shapes or ids differ, a number is not finite, or k is out of range.
    """
    ordered_with(NAME, "others", scores, others)
    one = numbers(NAME, "scores", scores, ("n_train", "n_test"))
    two = numbers(NAME, "others", others, ("n_train", "n_test"))
    same_shape(NAME, scores=one, others=two)
    check_k(NAME, k, len(one))
    shared = (top(one, k) * top(two, k)).sum(axis=0) / k
    shape = Proportion(len(shared), most=True)
    return summary(Estimate(shared, None), k / len(one), bootstrap, shape=shape, bounds=(0.0, 1.0))


@frozen
class TopKOverlap:
    """Top-k overlap with leaving each example out; see `top_k_overlap`.

    Args:
        k: How many of the most helpful examples.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"retraining"})
    k: int = 10

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the overlap with its interval."""
        scores = scores_of(NAME, evidence)
        outcomes_of(NAME, evidence)
        check_k(NAME, self.k, len(scores))
        plan = leave_one_out(len(scores), seed=evidence.seed)
        harm = -np.asarray(goodness(NAME, evidence, plan))
        return top_k_overlap(scores, harm, k=self.k, bootstrap=Bootstrap(seed=evidence.seed))
