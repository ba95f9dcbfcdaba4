"""Shortcut and mixed-source detection: whether scores point at the test's own kind."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from attrs import frozen

from dattri_core import Evidence, InputError, MetricResult
from dattri_metrics.arrays import labels, numbers, same_kind, truths
from dattri_metrics.bootstrap import DEFAULT, Bootstrap, summary
from dattri_metrics.evidence import fact, scores_of
from dattri_metrics.ids import ordered
from dattri_metrics.intervals import Proportion
from dattri_metrics.precision import expected_precision, precisions

Array = np.ndarray[Any, Any]


def shortcut_detection(
    scores: Any,
    train_shortcut: Any,
    test_shortcut: Any,
    *,
    train_ids: Any = None,
    test_ids: Any = None,
    bootstrap: Bootstrap = DEFAULT,
) -> MetricResult:
    """Return how well scores point at the train examples that a shortcut was learned from.

    Some train examples of one class carry a mark (a watermark, say), and the model learns the mark
    instead of the class. For each test that carries it, the average precision of ranking the marked
    train examples first, by score; then the mean over these tests:

        mean over marked tests j of AP(tau_j, marked)

    (Koh and Liang 2017, section 5.3, and Yolcu et al. 2025, arXiv 2410.07158, for the score.) Equal
    scores enter together, as in `average_precision`. The interval is over tests *and* train
    examples.

    Args:
        scores: tau, ``[n_train, n_test]``.
        train_shortcut: ``[n_train]`` true where the train example is marked.
        test_shortcut: ``[n_test]`` true where the test is, for which the shortcut decides.
        train_ids: Of ``train_shortcut``, for `Scores` with ids of their own.
        test_ids: Of ``test_shortcut``.
        bootstrap: The confidence of the interval.

    Returns:
        Value in [0, 1]; chance is the exact mean over random orders.

    Raises:
        InputError: Shapes do not match, a number is not finite, no train example is marked or all
            are, or no test is.
    """
    name = "shortcut-detection"
    scores = ordered(name, scores, "marks", train_ids, test_ids)
    tau = numbers(name, "scores", scores, ("n_train", "n_test"))
    of_train = truths(name, "train_shortcut", train_shortcut, ("n_train",))
    of_test = truths(name, "test_shortcut", test_shortcut, ("n_test",))
    if (len(of_train), len(of_test)) != tau.shape:
        raise InputError(
            f"{name}: scores {tau.shape}, train_shortcut {of_train.shape}, test_shortcut "
            f"{of_test.shape}; expected [n_train, n_test], [n_train] and [n_test]"
        )
    if not of_test.any():
        raise InputError(f"{name}: none of {len(of_test)} tests has the shortcut; give some")
    positive = np.broadcast_to(of_train[:, None], (len(tau), int(of_test.sum())))
    return _mean_precision(name, tau[:, of_test], positive, of_train, "the shortcut", bootstrap)


def mixed_source_detection(
    scores: Any,
    train_sources: Any,
    test_sources: Any,
    *,
    train_ids: Any = None,
    test_ids: Any = None,
    bootstrap: Bootstrap = DEFAULT,
) -> MetricResult:
    """Return how well scores point at train examples of the test's own source.

    The train set is a mixture of data sets. For each test, the average precision of ranking the
    train examples of its source first, by score; then the mean over tests:

        mean_j AP(tau_j, source = source_j)

    (Hammoudeh and Lowd 2022, arXiv 2201.10055, with an adversarial source; Yolcu et al. 2025, arXiv
    2410.07158, for the score.) Equal scores enter together, as in `average_precision`. The interval
    is over tests *and* train examples.

    Args:
        scores: tau, ``[n_train, n_test]``.
        train_sources: ``[n_train]`` integers or texts.
        test_sources: ``[n_test]``. To ask about one source, give the columns of its tests only.
        train_ids: Of ``train_sources``, for `Scores` with ids of their own.
        test_ids: Of ``test_sources``.
        bootstrap: The confidence of the interval.

    Returns:
        Value in [0, 1]; chance is the exact mean over random orders.

    Raises:
        InputError: Shapes do not match, a number is not finite, or no train example, or every one,
            is of a test's source.
    """
    name = "mixed-source-detection"
    scores = ordered(name, scores, "sources", train_ids, test_ids)
    tau = numbers(name, "scores", scores, ("n_train", "n_test"))
    of_train = labels(name, "train_sources", train_sources, tau.shape[0])
    of_test = labels(name, "test_sources", test_sources, tau.shape[1])
    same_kind(name, "sources", of_train, of_test)
    positive = of_train[:, None] == of_test
    return _mean_precision(name, tau, positive, of_train, "the source", bootstrap)


def _mean_precision(
    name: str, scores: Array, positive: Array, strata: Array, what: str, bootstrap: Bootstrap
) -> MetricResult:
    n, counts = len(scores), positive.sum(axis=0)
    if counts.min() < 1 or counts.max() == n:
        at = int(np.flatnonzero((counts < 1) | (counts == n))[0])
        raise InputError(
            f"{name}: {counts[at]} of {n} train examples have {what} of test {at} of those asked; "
            "some must, and some must not"
        )
    chance = float(expected_precision(n, counts).mean())
    trials = 1 / float((1 / counts).mean())  # a precision is a mean over positives
    return summary(
        precisions(scores, positive, strata),
        chance,
        bootstrap,
        shape=Proportion(trials),
        bounds=(0.0, 1.0),
    )


@frozen
class ShortcutDetection:
    """How well scores point at the examples of a shortcut; see `shortcut_detection`.

    They are ``world.facts["shortcut"] = {"train": [...], "test": [...]}``, truth values.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"fact:shortcut"})

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the mean average precision with its interval."""
        train, test = fact("shortcut-detection", evidence, "shortcut")
        scores = scores_of("shortcut-detection", evidence)
        return shortcut_detection(scores, train, test, bootstrap=Bootstrap(seed=evidence.seed))


@frozen
class MixedSourceDetection:
    """How well scores point at the test's own source; see `mixed_source_detection`.

    Sources are ``world.facts["sources"] = {"train": [...], "test": [...]}``, integers or texts.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"fact:sources"})

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the mean average precision with its interval."""
        train, test = fact("mixed-source-detection", evidence, "sources")
        scores = scores_of("mixed-source-detection", evidence)
        return mixed_source_detection(scores, train, test, bootstrap=Bootstrap(seed=evidence.seed))
