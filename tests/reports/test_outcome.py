"""A row of the demo's table: what a method is measured by, and what it does not give."""

import numpy as np
import torch
from attrs import frozen
from dattri_parts.measuring.attribution import WHOLE_COLUMNS
from dattri_reports.outcome import run_method
from oracles.toy_tasks import examples, mlp

from dattri_core import Task


@frozen(eq=False)
class Setting:
    """What the demo gives a method."""

    task: Task
    train: tuple
    test: tuple
    flipped: np.ndarray
    damping: float = 1e-2

    @property
    def train_ids(self):
        return range(len(self.flipped))

    @property
    def test_ids(self):
        return range(len(self.test[1]))


def test_a_scorer_of_whole_columns_has_test_scores_and_no_self_influence():
    train, test = (examples(n, seed=seed, dtype=torch.float32) for n, seed in ((20, 1), (6, 2)))
    flipped = np.arange(20) % 5 == 0
    setting = Setting(Task(mlp(dtype=torch.float32)), train, test, flipped)
    seen = []

    def metric(suspicion, marked):
        seen.append((np.asarray(suspicion), marked))
        return len(seen)

    outcome = run_method("knn-shapley", setting, metric)
    assert outcome.error == ""
    assert outcome.self_note == WHOLE_COLUMNS
    assert outcome.self_influence is None
    assert outcome.by_self is None
    ((suspicion, marked),) = seen
    assert outcome.by_test == 1
    assert np.allclose(suspicion, -outcome.scores.values.double().numpy().mean(1))
    assert marked is flipped
