"""A ground truth for the laws of attributors that ask models of other train sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import torch
from attrs import frozen

from dattri_core.batch import Batch
from dattri_core.errors import InputError
from dattri_core.experiment import Counterfactual
from dattri_core.laws.law import law, require
from dattri_core.laws.worlds import N_TRAIN, regression
from dattri_core.task import Task

RATE = 1e-2
"""L2 rate of the models: a train set of one example has one optimum too."""
DRAWN = 200
"""Train sets that are drawn at most: no law asks how near a mean comes to its limit."""
LEAST = 0.4
"""Correlation that scores have at least with what examples do to models."""
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
        """Return the target of each model on each measured example, ``[k, n_measured]``.

        Raises:
            InputError: It is not that of the task.
        """
        known = "loss" if self.task.target is None else self.task.target.name
        if target != known:
            raise InputError(
                f"ground truth: asked for the target {target!r}, that of the task is {known!r}; "
                'ask for task.target.name, "loss" where task.target is None'
            )
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


def _asks_of_tests(bench: Any) -> str | None:
    if not asks(bench.part):
        return "it asks for no models of other train sets"
    measured = getattr(bench.part, "measured", "test")
    return None if measured == "test" else "it asks what models do to train examples"


@law("method", _asks_of_tests)
def scores_follow_the_models(bench: Any) -> None:
    """Scores rise with what an example does to each test, over models of all 2^n - 1 train sets."""
    # The correlation of all scores with E[U_j | i trained on] - E[U_j | i left out] is above 0.4,
    # whether they are drawn or not, and whatever sizes of train sets they weigh.
    world = regression()
    numbers = np.arange(1, 2**N_TRAIN)
    masks = numbers[:, None] >> np.arange(N_TRAIN) & 1 == 1
    truth = Refitted(world.task(), world.train, world.test)
    utility = -truth.outcomes([Counterfactual(mask) for mask in masks], "loss")
    effects = np.stack([utility[m].mean(0) - utility[~m].mean(0) for m in masks.T])
    scores = bench.values(world).double().numpy()
    found = float(np.corrcoef(scores.ravel(), effects.ravel())[0, 1])
    require(
        found > LEAST,
        f"scores correlate {found:.2f} with what examples do to models, expected over {LEAST}; "
        "rows are the train examples in order, and a score is positive where the example helps",
    )
