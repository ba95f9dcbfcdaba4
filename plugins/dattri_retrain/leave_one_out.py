"""True leave-one-out: the model trained again without each example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from attrs import field, frozen, validators
from dattri_parts.training import leave_one_out

from dattri_core import Counterfactual, Outcomes, Task
from dattri_retrain.asking import Question, as_outcomes, facts_of

Array = np.ndarray[Any, Any]


@frozen
class LeaveOneOut:
    """S_ij = n (U_j(all) - U_j(all but i)), by retraining; n is the size of the train set.

    U_j is the target on test example j, turned so that more is better. ``removal_effect()`` of the
    scores is then the change of the target itself, not a prediction of it. The models of one seed
    start from the same weights; what seeds of training change is noise of the score, and more of
    them average it.

    An attributor is given a task, which is a trained model and does not know how it came to be. So
    what trains it again is a field of this value, like every part of a method, and not one more
    thing in a task that all other methods would ignore. The data that are attributed must be those
    of the retraining, and the target one that it measures.

    Args:
        ground_truth: Answers what models give: `CounterfactualStore`, or any Outcomes.
        seeds: Trainings of each model; seeds 0, 1, ... of ``seed``.
        seed: The first seed.
    """

    ground_truth: Outcomes | None = field(default=None, converter=as_outcomes)
    seeds: int = field(default=1, validator=validators.ge(1))
    seed: int = field(default=0, validator=validators.ge(0))

    def attribute(
        self,
        task: Task,
        train: Any,
        test: Any,
        *,
        out: str | Path | None = None,
        progress: bool | None = None,
        dry_run: bool = False,
        **settings: Any,
    ) -> Any:
        """Return the scores ``[n_train, n_test]``, float64.

        Args:
            task: Its target is what models are asked for.
            train: That of the retraining.
            test: That of the retraining.
            out: Folder to write the scores to.
            progress: Show a bar; default only on a terminal.
            dry_run: Only say, as text, how many models would be trained.
            settings: Memory of other methods; nothing to set here.

        Raises:
            SpecError: There is no ground truth, or it does not measure the target.
            InputError: It is of other examples, or of them in another order.
        """
        asked = Question.of("leave-one-out", self.ground_truth, task, train, test, progress)
        n = len(asked.train)
        plans = [
            [Counterfactual(np.ones(n, np.bool_), seed), *leave_one_out(n, seed=seed)]
            for seed in range(self.seed, self.seed + self.seeds)
        ]
        everything = [counterfactual for plan in plans for counterfactual in plan]
        if dry_run:
            return f"leave-one-out: {asked.missing(everything)}"
        found = asked.utilities(everything).reshape(self.seeds, n + 1, -1)
        effects = n * (found[:, :1] - found[:, 1:])
        spread: dict[str, float] = {}
        if self.seeds > 1:
            errors = effects.std(0, ddof=1) / np.sqrt(self.seeds)
            spread = {
                "largest_standard_error": float(errors.max()),
                "mean_standard_error": float(errors.mean()),
            }
        facts = facts_of("leave-one-out", self, **spread)
        return asked.scores(effects.mean(0), facts, out)
