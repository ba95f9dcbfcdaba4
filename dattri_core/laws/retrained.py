"""A ground truth for the laws of attributors that ask models of other train sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch
from attrs import frozen

from dattri_core.batch import Batch
from dattri_core.experiment import Counterfactual
from dattri_core.task import Task

RATE = 1e-2
"""L2 rate of the models: a train set of one example has one optimum too."""
DRAWN = 200
"""Train sets that are drawn at most: no law asks how near a mean comes to its limit."""
COUNTS = frozenset({"budget", "count"})
"""Fields of attributors that say how many train sets are drawn."""


@frozen(eq=False)
class Refitted:
    """Outcomes of least squares, refitted to every train set in closed form.

    w = argmin mean over the train set of the loss + rate / 2 |w|^2, the bias included.

    Args:
        task: A linear layer with squared loss, and the target that is asked for.
        train: The examples that masks choose from.
        measured: The examples that outcomes are on.
    """

    task: Task
    train: Batch
    measured: Batch

    def outcomes(self, counterfactuals: Sequence[Counterfactual], target: str) -> Any:
        """Return the target of each model on each measured example, ``[k, n_measured]``."""
        del target  # there is one
        found = [self._measured(torch.from_numpy(c.mask.copy())) for c in counterfactuals]
        return np.stack(found)

    def _measured(self, mask: torch.Tensor) -> Any:
        inputs, wanted = (side[mask].double() for side in self.train)
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
        matrix = inputs.mT @ inputs / len(inputs)
        matrix.diagonal().add_(RATE)
        solution = torch.linalg.solve(matrix, inputs.mT @ wanted / len(inputs)).mT
        model = torch.nn.Linear(solution.shape[1] - 1, solution.shape[0]).double()
        with torch.no_grad():
            model.weight.copy_(solution[:, :-1])
            model.bias.copy_(solution[:, -1])
            batch = tuple(side.double() for side in self.measured)
            target = self.task.target
            function = self.task.loss if target is None else target.function
            assert callable(function)
            return function(model, batch).numpy()


def asks(part: Any) -> bool:
    """Return whether an attributor asks a ground truth for models of other train sets."""
    return attrs.has(type(part)) and "ground_truth" in attrs.fields_dict(type(part))


def draws(part: Any) -> bool:
    """Return whether such an attributor draws the train sets at random."""
    return asks(part) and bool(COUNTS & attrs.fields_dict(type(part)).keys())


def answered(part: Any, task: Task, train: Batch, test: Batch) -> Any:
    """Return such an attributor with a ground truth of its own and few train sets.

    What it asks about is its class attribute ``measured``: ``"test"``, or ``"train"`` examples.
    """
    fields = attrs.fields_dict(type(part))
    few = {name: min(DRAWN, getattr(part, name)) for name in COUNTS & fields.keys()}
    measured = train if getattr(part, "measured", "test") == "train" else test
    return attrs.evolve(part, ground_truth=Refitted(task, train, measured), **few)
