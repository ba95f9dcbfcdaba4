"""Datamodels: the effect of each train example, regressed on models of random subsets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from attrs import field, frozen, validators
from dattri_parts.training import random_subsets

from dattri_core import Outcomes, Task
from dattri_retrain.asking import Question, as_outcomes, facts_of
from dattri_retrain.linear import lasso_datamodel, ridge_datamodel


@frozen
class Datamodels:
    """S_ij = n w_ij of the linear model U_j(S) ~ b_j + sum_(i in S) w_ij of random subsets S.

    U_j is the target on test example j, turned so that more is better; n w_ij makes
    ``removal_effect()`` the predicted change of the target when i is removed. All subsets hold the
    same number of examples, so weights are relative to those of the average example: a constant
    added to a column changes no prediction.

    Source: Ilyas et al. 2022, Datamodels: Predicting Predictions from Training Data
    (arXiv 2202.00622).

    Args:
        ground_truth: Answers what models give; see `LeaveOneOut`.
        count: Random subsets, each one model.
        fraction: Of the train set that each holds.
        penalty: ``"ridge"``, or ``"lasso"`` as in the paper.
        strength: Of the penalty; None: chosen for each test example by cross-validation.
        seed: Of the subsets and of the trainings.
    """

    ground_truth: Outcomes | None = field(default=None, converter=as_outcomes)
    count: int = field(default=1000, validator=validators.ge(3))
    fraction: float = field(default=0.5, validator=[validators.gt(0), validators.lt(1)])
    penalty: Literal["ridge", "lasso"] = "ridge"
    strength: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    seed: int = 0

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
        asked = Question.of("datamodels", self.ground_truth, task, train, test, progress)
        n = len(asked.train)
        plan = random_subsets(n, self.count, fraction=self.fraction, seed=self.seed)
        if dry_run:
            return f"datamodels: {asked.missing(plan)}"
        utilities = asked.utilities(plan)
        masks = np.stack([counterfactual.mask for counterfactual in plan])
        if self.penalty == "ridge":
            fit = ridge_datamodel(masks, utilities, self.strength)
        else:
            fit = lasso_datamodel(masks, utilities, self.strength, seed=self.seed)
        facts = facts_of(
            "datamodels",
            self,
            strength=fit.strength.tolist(),
            validation_error=fit.validation_error.tolist(),
            variance=fit.variance.tolist(),
        )
        return asked.scores(n * fit.weights, facts, out)
