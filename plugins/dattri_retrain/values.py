"""Data values by retraining, as attributors: Shapley and its kin, Banzhaf, Data-OOB."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from attrs import field, frozen, validators
from dattri_parts.training import random_subsets

from dattri_core import Examples, Outcomes, Task, bar
from dattri_retrain.asking import Question, as_outcomes, facts_of
from dattri_retrain.estimate import Estimate, Stopping
from dattri_retrain.game import RetrainedGame
from dattri_retrain.out_of_bag import FRACTION, data_oob
from dattri_retrain.permutations import beta_weights, semivalue
from dattri_retrain.sample_reuse import banzhaf


@frozen
class Semivalue:
    """S_ij = E_pi[w_(place of i) (U_j(those before i, and i) - U_j(those before i))].

    pi is a random order of the train set and U_j(S) the target on test example j of the model
    trained on S, turned so that more is better; all trainings have one seed. The data value of an
    example is the mean over the test set. With w = 1 these are Shapley values: they sum to
    U_j(all) - U_j(none). `dattri_retrain.semivalue` is the same for a game of any kind.

    Scores are values and no effects of a removal: `Scores.removal_effect` of them has no unit.

    Args:
        ground_truth: Answers what models give; see `LeaveOneOut`.
        alpha: Of Beta-Shapley; above 1, small train sets count more.
        beta: Of Beta-Shapley; above 1, large ones do.
        truncation: Once a permutation's first sets are this near to U_j(all) for all j, its other
            examples add 0; None: never.
        tolerance: Standard error of every score at which sampling stops; None: only the budget.
        budget: Largest number of models, besides those for ``empty``.
        empty: The target without a train set, such as log(10) for the cross-entropy of ten classes.
            None: its mean over models of one example, ten of them. But for sampling noise it
            moves all scores of a column alike.
        seed: Of permutations and trainings.
    """

    ground_truth: Outcomes | None = field(default=None, converter=as_outcomes)
    alpha: float = field(default=1.0, validator=validators.gt(0))
    beta: float = field(default=1.0, validator=validators.gt(0))
    truncation: float | None = field(default=None, validator=validators.optional(validators.ge(0)))
    tolerance: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    budget: int = field(default=10_000, validator=validators.ge(1))
    empty: float | None = None
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
        """Return the scores ``[n_train, n_test]``, float64; see `LeaveOneOut.attribute`.

        The provenance holds the largest standard error, their mean, and that of each data value;
        `estimate` gives that of every score.
        """
        asked = Question.of("semivalue", self.ground_truth, task, train, test, False)
        if dry_run:
            return f"semivalue: at most {self.budget} models"
        found = self._sample(asked, progress)
        return asked.scores(found.values, facts_of("semivalue", self, **found.facts()), out)

    def estimate(
        self, task: Task, train: Any, test: Any, *, progress: bool | None = None
    ) -> Estimate:
        """Return the scores with the standard error of each; arguments as of `attribute`."""
        asked = Question.of("semivalue", self.ground_truth, task, train, test, False)
        return self._sample(asked, progress)

    def _sample(self, asked: Question, progress: bool | None) -> Estimate:
        n = len(asked.train)
        with bar("semivalue", self.budget, progress) as shown:
            return semivalue(
                RetrainedGame(asked, self.seed, self.empty),
                n,
                weights=beta_weights(n, self.alpha, self.beta),
                truncation=self.truncation,
                stopping=Stopping(self.tolerance, self.budget),
                seed=self.seed,
                advance=shown.advance,
            )


@frozen
class Banzhaf:
    """S_ij = E[U_j(S) | i in S] - E[U_j(S) | i not in S], S with every example by a fair coin.

    U_j(S) is the target on test example j of the model trained on S, turned so that more is better.
    Every model counts for every example, so the budget need not grow with the train set.
    `dattri_retrain.banzhaf` is the same for a game of any kind. Scores are values and no effects of
    a removal.

    Args:
        ground_truth: Answers what models give; see `LeaveOneOut`.
        tolerance: Standard error of every score at which sampling stops; None: only the budget.
        budget: Largest number of models.
        empty: See `Semivalue`; it hardly ever counts.
        seed: Of subsets and trainings.
    """

    ground_truth: Outcomes | None = field(default=None, converter=as_outcomes)
    tolerance: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    budget: int = field(default=1000, validator=validators.ge(1))
    empty: float | None = None
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
        """Return the scores ``[n_train, n_test]``, float64; see `Semivalue.attribute`."""
        asked = Question.of("banzhaf", self.ground_truth, task, train, test, False)
        if dry_run:
            return f"banzhaf: at most {self.budget} models"
        found = self._sample(asked, progress)
        return asked.scores(found.values, facts_of("banzhaf", self, **found.facts()), out)

    def estimate(
        self, task: Task, train: Any, test: Any, *, progress: bool | None = None
    ) -> Estimate:
        """Return the scores with the standard error of each; arguments as of `attribute`."""
        asked = Question.of("banzhaf", self.ground_truth, task, train, test, False)
        return self._sample(asked, progress)

    def _sample(self, asked: Question, progress: bool | None) -> Estimate:
        with bar("banzhaf", self.budget, progress) as shown:
            return banzhaf(
                RetrainedGame(asked, self.seed, self.empty),
                len(asked.train),
                stopping=Stopping(self.tolerance, self.budget),
                seed=self.seed,
                advance=shown.advance,
            )


@frozen
class DataOOB:
    """S_ij = mean over the models that were trained without i of their utility on i, for every j.

    It asks no test example: low values are of examples that models of the others get wrong, such
    as wrong labels. The ground truth must measure the *train* examples, in their order:
    ``attrs.evolve(world.retraining, test_data=world.train)``. See `data_oob`.

    Args:
        ground_truth: Answers what models give on the train examples.
        count: Models.
        fraction: Of the train set that each holds; as many as a bootstrap holds by default.
        seed: Of the subsets and of the trainings.
    """

    measured: ClassVar[str] = "train"
    ground_truth: Outcomes | None = field(default=None, converter=as_outcomes)
    count: int = field(default=1000, validator=validators.ge(2))
    fraction: float = field(default=FRACTION, validator=[validators.gt(0), validators.lt(1)])
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
        """Return the values in every column, ``[n_train, n_test]``; see `LeaveOneOut.attribute`.

        Args:
            task: Its target is what models are asked for.
            train: That of the retraining, which also measures it.
            test: Counted, not read.
            out: Folder to write the scores to.
            progress: Show a bar; default only on a terminal.
            dry_run: Only say, as text, how many models would be trained.
            settings: Memory of other methods; nothing to set here.
        """
        both = Examples.of(train, "train")
        asked = Question.of("data-oob", self.ground_truth, task, both, both, progress)
        n = len(asked.train)
        plan = random_subsets(n, self.count, fraction=self.fraction, seed=self.seed)
        if dry_run:
            return f"data-oob: {asked.missing(plan)}"
        utilities = asked.utilities(plan)
        found = data_oob(np.stack([counterfactual.mask for counterfactual in plan]), utilities)
        columns = Examples.of(test, "test")
        values = np.repeat(found.values, len(columns), axis=1)
        return asked.scores(values, facts_of("data-oob", self, **found.facts()), out, columns)
