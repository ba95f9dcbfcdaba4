"""Asking a ground truth what models give, with the question and the sign of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import field, fields, frozen

from dattri_core import (
    Counterfactual,
    Examples,
    InputError,
    Outcomes,
    Retraining,
    Scores,
    ScoresWriter,
    SpecError,
    Task,
    default_registry,
)
from dattri_retrain.same_data import require_same
from dattri_retrain.store import CounterfactualStore

Array = np.ndarray[Any, Any]


def as_outcomes(given: Any) -> Any:
    """Return a ground truth: as it is, or made of plain data, as a file spells it.

    ``{"name": "retraining", "folder": "bank", "retraining": {"setting": "digits"}}``: a registered
    ground truth and its fields; `SettingRetraining` has those of the retraining.

    Raises:
        SpecError: It is neither.
    """
    if given is None or isinstance(given, Outcomes):
        return given
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise SpecError(
            f"ground truth: got {given!r} ({type(given).__name__}), expected Outcomes such as "
            "CounterfactualStore(folder, world.retraining), or {'name': 'retraining', 'folder': "
            "..., 'retraining': {'setting': ...}}"
        )
    fields = {str(key): value for key, value in given.items() if key != "name"}
    return default_registry().make("ground_truth", given["name"], **fields)


def facts_of(name: str, attributor: Any, **estimate: Any) -> dict[str, Any]:
    """Return what the provenance says of a method and of its estimate, if it is one."""
    settings = {
        a.name: getattr(attributor, a.name)
        for a in fields(type(attributor))
        if a.name != "ground_truth"
    }
    facts: dict[str, Any] = {"method": {"name": name, **settings}}
    return {**facts, "estimate": estimate} if estimate else facts


@frozen(eq=False)
class Question:
    """What a task asks of models that are trained again.

    Args:
        name: Of the method, for messages.
        outcomes: The ground truth.
        task: Whose target is asked for, and says which way is better.
        train: The examples that masks choose from.
        test: The examples that outcomes are on.
        progress: Whether a store shows a bar while it trains.
    """

    name: str
    outcomes: Outcomes
    task: Task
    train: Examples
    test: Examples
    progress: bool | None = None
    target: str = field(init=False)

    def __attrs_post_init__(self) -> None:
        target = "loss" if self.task.target is None else self.task.target.name
        object.__setattr__(self, "target", target)
        if isinstance(self.outcomes, CounterfactualStore):
            self._check_store(self.outcomes)

    @staticmethod
    def of(
        name: str,
        ground_truth: Outcomes | None,
        task: Task,
        train: Any,
        test: Any,
        progress: bool | None,
    ) -> Question:
        """Return the question, or say what is missing.

        Raises:
            SpecError: There is no ground truth, or it does not measure the target.
            InputError: It is of other examples, or of them in another order.
        """
        if ground_truth is None:
            raise SpecError(
                f"{name}: needs models that are trained again, and a task has trained ones only; "
                "give the method a ground truth: dattri.method(..., "
                "ground_truth=CounterfactualStore(folder, world.retraining))"
            )
        sides = Examples.of(train, "train"), Examples.of(test, "test")
        return Question(name, ground_truth, task, *sides, progress)

    def utilities(self, counterfactuals: Sequence[Counterfactual]) -> Array:
        """Return what each model gives on each test example, turned so that more is better.

        ``[len(counterfactuals), n_test]``, float64.
        """
        if isinstance(self.outcomes, CounterfactualStore):
            self.outcomes.fill(counterfactuals, progress=self.progress)
        found = np.asarray(self.outcomes.outcomes(counterfactuals, self.target), np.float64)
        expected = len(counterfactuals), len(self.test)
        if found.shape != expected:
            raise InputError(
                f"{self.name}: the ground truth gave outcomes of shape {found.shape}, expected "
                f"{expected}: a row for each train set, a column for each of the test examples; "
                "attribute the train and test set of its retraining"
            )
        return -self.task.sign * found

    def missing(self, counterfactuals: Sequence[Counterfactual]) -> str:
        """Say how many models there would be to train."""
        if not isinstance(self.outcomes, CounterfactualStore):
            return f"{len(counterfactuals)} models"
        count = len(self.outcomes.missing(counterfactuals))
        return f"{len(counterfactuals)} models, {count} of them to train"

    def _check_store(self, store: CounterfactualStore) -> None:
        retraining = store.retraining
        if self.target not in retraining.targets:
            raise SpecError(
                f"{self.name}: the task asks for {self.target!r}, and the retraining measures "
                f"{', '.join(map(repr, retraining.targets))}; give the task one of these as target"
            )
        if retraining.targets[self.target] != (self.task.sign < 0):
            raise SpecError(
                f"{self.name}: of {self.target!r}, the task says that "
                f"{'more' if self.task.sign < 0 else 'less'} is better and the retraining the "
                "opposite; they must agree for scores to have a sign"
            )
        sizes = len(self.train), len(self.test)
        theirs = retraining.n_train, retraining.n_test
        if sizes != theirs:
            raise InputError(
                f"{self.name}: got {sizes[0]} train and {sizes[1]} test examples, and the "
                f"retraining has {theirs[0]} and {theirs[1]}; attribute its own data"
            )
        self._check_data(retraining)

    def _check_data(self, retraining: Retraining) -> None:
        """Refuse other examples than the retraining's, where it shows its own.

        ``train_data`` and ``test_data`` are no part of the protocol, but where a retraining has
        them, as `ModelRetraining`, they must be what scores are of.
        """
        for side, examples in (("train", self.train), ("test", self.test)):
            fix = (
                "give dattri.attribute its own data in their order, retraining.train_data and "
                "retraining.test_data, or a store whose retraining has these data"
            )
            if side == "test" and self.test is self.train:
                fix = (
                    "models must be measured on the train examples: give a store of "
                    "attrs.evolve(retraining, test_data=retraining.train_data)"
                )
            require_same(self.name, side, examples, getattr(retraining, f"{side}_data", None), fix)

    def scores(
        self,
        values: Array,
        facts: Mapping[str, Any],
        out: str | Path | None,
        columns: Examples | None = None,
    ) -> Scores:
        """Return values as scores.

        Args:
            values: ``[n_train, n_test]``, positive where the train example helps.
            facts: Of the provenance: ``"method"``, and what the estimate reports.
            out: Folder to write the scores to.
            columns: The test examples of the scores, where others than those were asked for.
        """
        provenance = {
            **facts,
            "n_train": len(self.train),
            "target": {
                "name": self.task.target_name,
                "higher_is_better": self.task.sign < 0,
            },
            "ground_truth": self._source(),
        }
        test = self.test if columns is None else columns
        ids = list(self.train.ids), list(test.ids)
        if out is None:
            return Scores(torch.from_numpy(np.ascontiguousarray(values)), *ids, provenance)
        with ScoresWriter(out, len(self.train), len(test), torch.float64) as writer:
            writer.values[:] = values
            return writer.finish(*ids, provenance)

    def _source(self) -> dict[str, Any]:
        found: dict[str, Any] = {"kind": type(self.outcomes).__name__, "target": self.target}
        if isinstance(self.outcomes, CounterfactualStore):
            found["fingerprint"] = self.outcomes.retraining.fingerprint
        return found
