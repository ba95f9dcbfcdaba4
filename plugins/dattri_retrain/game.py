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
    """Utilities of sets by models trained on them; of no example, a constant.

    There is no model without a train set. But for sampling noise, the constant moves all Shapley
    values of a column alike, so no order depends on it.

    Args:
        asked: What models are asked for.
        seed: Of every training: sets differ by their examples only.
        empty: The target of no train set. None: its mean over models of one example, ten of them,
            for each test example.
    """

    asked: Question
    seed: int
    empty: float | None

    def __call__(self, masks: Array) -> Array:
        """Return utilities ``[B, m]`` of masks ``[B, n]``."""
        found = np.empty((len(masks), len(self.asked.test)))
        some = masks.any(1)
        if some.any():
            found[some] = self._trained(masks[some])
        if not some.all():
            found[~some] = self._of_none(masks.shape[1])
        return found

    def _of_none(self, n: int) -> Array | float:
        if self.empty is not None:
            return -self.asked.task.sign * self.empty
        random = np.random.Generator(np.random.PCG64(RandomStream(self.seed, "alone").key(n)))
        alone = np.eye(n, dtype=np.bool_)[random.permutation(n)[:ALONE]]
        mean: Array = self._trained(alone).mean(0)
        return mean

    def _trained(self, masks: Array) -> Array:
        return self.asked.utilities([Counterfactual(mask, self.seed) for mask in masks])
