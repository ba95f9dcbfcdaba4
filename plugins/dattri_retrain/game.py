"""The game that retraining plays: the utility of a set is what a model trained on it gives."""

from __future__ import annotations

from typing import Any

import numpy as np
from attrs import frozen

from dattri_core import Counterfactual, RandomStream
from dattri_retrain.asking import Question

Array = np.ndarray[Any, Any]
ALONE = 10
"""Models of one example whose mean outcome stands for that of none."""


@frozen(eq=False)
class RetrainedGame:
    """Utilities of sets; see `retrained_game`.

    Args:
        asked: What models are asked for.
        seed: Of every training: sets differ by their examples only.
        empty: ``[m]``, the utility of no example.
    """

    asked: Question
    seed: int
    empty: Array

    def __call__(self, masks: Array) -> Array:
        """Return utilities ``[B, m]`` of masks ``[B, n]``."""
        found = np.tile(self.empty, (len(masks), 1))
        some = masks.any(1)
        if some.any():
            plan = [Counterfactual(mask, self.seed) for mask in masks[some]]
            found[some] = self.asked.utilities(plan)
        return found


def retrained_game(asked: Question, seed: int, empty: float | None) -> RetrainedGame:
    """Return the game of a question.

    Args:
        asked: What models are asked for.
        seed: Of every training.
        empty: The target of no train set, for which there is no model. None: its mean over models
            of one example, ten of them, for each test example. It moves all Shapley values of a
            column alike, so no order depends on it.
    """
    if empty is not None:
        constant = np.full(len(asked.test), -asked.task.sign * empty)
        return RetrainedGame(asked, seed, constant)
    n = len(asked.train)
    random = np.random.Generator(np.random.PCG64(RandomStream(seed, "alone").key(n)))
    alone = np.eye(n, dtype=np.bool_)[random.permutation(n)[:ALONE]]
    found = asked.utilities([Counterfactual(mask, seed) for mask in alone])
    return RetrainedGame(asked, seed, found.mean(0))
