"""Class and subclass detection: whether the most helpful examples are of the class."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from attrs import frozen
from torch import Tensor

from dattri_core import Evidence, InputError, MetricResult
from dattri_metrics.arrays import labels, numbers, same_kind
from dattri_metrics.bootstrap import DEFAULT, Bootstrap, summary
from dattri_metrics.evidence import fact, scores_of
from dattri_metrics.ids import ordered
from dattri_metrics.intervals import Proportion
from dattri_metrics.spread import Estimate
from dattri_metrics.top import check_k, top


def class_detection(
    scores: Any,
    train_labels: Any,
    test_labels: Any,
    *,
    k: int = 1,
    train_ids: Any = None,
    test_ids: Any = None,
    bootstrap: Bootstrap = DEFAULT,
) -> MetricResult:
    """Return the share of the k most helpful examples that are of the test's class.

        mean_j |{i in top_k(tau_j): class_i = class_j}| / k

    (Hanawa et al. 2021, arXiv 2006.04528, the identical class test, with k = 1.) With subclasses,
    which the model was not trained on, it is their identical subclass test. Ties at the last places
    are broken at random and the mean over that is returned. The interval is over tests.

    Args:
        scores: tau, ``[n_train, n_test]``.
        train_labels: ``[n_train]`` integers or texts.
        test_labels: ``[n_test]``; labels, or what the model predicts, which is then explained.
        k: From 1 to n_train - 1.
        train_ids: Of ``train_labels``, for `Scores` with ids of their own.
        test_ids: Of ``test_labels``.
        bootstrap: The confidence of the interval, Wilson's.

    Returns:
        Value in [0, 1]. Chance: the mean share of the test's class in the train set. Ceiling: below
        1 where a class has fewer than k train examples.

    Raises:
        InputError: Shapes do not match, a number is not finite, k is out of range, all train labels
            are the same, or no test label occurs among them, as of numbers and texts.
    """
    scores = ordered("class-detection", scores, "labels", train_ids, test_ids)
    return _detection("class-detection", scores, train_labels, test_labels, k, bootstrap)


def _detection(
    name: str, scores: Any, train: Any, test: Any, k: int, bootstrap: Bootstrap
) -> MetricResult:
    tau = numbers(name, "scores", scores, ("n_train", "n_test"))
    of_train = labels(name, "train_labels", train, tau.shape[0])
    of_test = labels(name, "test_labels", test, tau.shape[1])
    same_kind(name, "labels", of_train, of_test)
    check_k(name, k, len(tau))
    if len(np.unique(of_train)) < 2:
        raise InputError(
            f"{name}: all train labels are {of_train[0]!r}; every ranking would be right, give "
            "examples of two or more classes"
        )
    same = of_train[:, None] == of_test
    counts = same.sum(axis=0)
    shares = (top(tau, k) * same).sum(axis=0) / k
    return summary(
        Estimate(shares, None),
        float(counts.mean() / len(tau)),
        bootstrap,
        shape=Proportion(len(shares), most=True),
        bounds=(0.0, 1.0),
        ceiling=float(np.minimum(counts, k).mean() / k),
        per_test=True,
    )


@frozen
class ClassDetection:
    """Share of the most helpful examples that are of the test's class; see `class_detection`.

    Args:
        k: How many of the most helpful examples.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})
    k: int = 1

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the share with its interval."""
        train, test = evidence.world.train, evidence.world.test
        pairs = all(isinstance(side, (tuple, list)) for side in (train, test))
        if not pairs or not all(isinstance(side[-1], Tensor) for side in (train, test)):
            raise InputError(
                "class-detection: the world's data have no labels as their last tensor"
            )
        return _detection(
            "class-detection",
            scores_of("class-detection", evidence),
            train[-1],
            test[-1],
            self.k,
            Bootstrap(seed=evidence.seed),
        )


@frozen
class SubclassDetection:
    """The same for subclasses that the model was not told of; see `class_detection`.

    They are ``world.facts["subclasses"] = {"train": [...], "test": [...]}``. A model that knows
    the class only finds the subclass by its share in the class, which is above chance here.

    Args:
        k: How many of the most helpful examples.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"fact:subclasses"})
    k: int = 1

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the share with its interval."""
        name = "subclass-detection"
        train, test = fact(name, evidence, "subclasses")
        scores = scores_of(name, evidence)
        return _detection(name, scores, train, test, self.k, Bootstrap(seed=evidence.seed))
