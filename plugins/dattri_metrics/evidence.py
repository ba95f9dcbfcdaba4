"""What parts take from their evidence, checked before any model is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dattri_core import Counterfactual, Evidence, InputError, Outcomes, Task
from dattri_metrics.arrays import numbers
from dattri_metrics.ids import of_world

Array = np.ndarray[Any, Any]


def scores_of(metric: str, evidence: Evidence) -> Array:
    """Return the scores, float64 ``[n_train, n_test]``, in the order of the world.

    Raises:
        InputError: They are not finite, not of the size of the world, or have other ids.
    """
    given = of_world(metric, evidence.scores, evidence.world)
    scores = numbers(metric, "scores", given, ("n_train", "n_test"))
    size = (len(evidence.world.train_ids), len(evidence.world.test_ids))
    if scores.shape != size:
        raise InputError(
            f"{metric}: scores have shape {scores.shape}, the world has {size[0]} train and "
            f"{size[1]} test examples"
        )
    return scores


def outcomes_of(metric: str, evidence: Evidence) -> Outcomes:
    """Return what trains models again.

    Raises:
        InputError: The evidence has none.
    """
    if evidence.outcomes is None:
        raise InputError(
            f"{metric}: the evidence has no outcomes; give a store of retrained models, "
            "default_registry().resolve('ground_truth', 'retraining')(folder, world.retraining)"
        )
    return evidence.outcomes


def goodness(
    metric: str, evidence: Evidence, plan: Sequence[Counterfactual], target: str | None = None
) -> Array:
    """Return outcomes of models trained on other train sets, turned so that more is better.

    Args:
        metric: Who asks, for the message.
        evidence: With outcomes.
        plan: The train sets.
        target: The world's own by default.

    Returns:
        ``[len(plan), n_test]``, float64.

    Raises:
        InputError: The world does not measure the target.
    """
    target = evidence.world.target if target is None else target
    targets = evidence.world.retraining.targets
    if target not in targets:
        raise InputError(
            f"{metric}: the world measures {', '.join(sorted(targets))} of a retrained model, not "
            f"{target!r}; make its retraining with that target"
        )
    found = outcomes_of(metric, evidence).outcomes(plan, target)
    return found if targets[target] else -found


def attribute_of(metric: str, evidence: Evidence) -> Callable[[Task], Array]:
    """Return the method itself.

    Raises:
        InputError: The evidence has none.
    """
    if evidence.attribute is None:
        raise InputError(
            f"{metric}: the evidence has no attribute; give the method as a function "
            "task -> scores [n_train, n_test]"
        )
    return evidence.attribute


def fact(metric: str, evidence: Evidence, name: str) -> tuple[Any, Any]:
    """Return what the world says of each train and of each test example under a name.

    Raises:
        InputError: The world does not say it.
    """
    said = evidence.world.facts.get(name)
    if not isinstance(said, dict) or not {"train", "test"} <= set(said):
        raise InputError(
            f"{metric}: the world's facts have no {name!r}; it takes "
            f"facts[{name!r}] = {{'train': [...], 'test': [...]}}, one entry for each example"
        )
    return said["train"], said["test"]


def other_seed(seed: int, k: int) -> int:
    """Return the k-th seed that goes with one, from 0 to 2^32 - 1."""
    return int(np.random.SeedSequence([seed, k]).generate_state(1)[0])
