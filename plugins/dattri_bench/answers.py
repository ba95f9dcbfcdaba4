"""What one entrant says in one world: computed once, for all metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from attrs import asdict, evolve, frozen
from dattri_parts.measuring.attribution import (
    Attribution,
    attribute,
    follows_run,
    is_iterative,
    referenced,
    self_influence,
)
from typing_extensions import Protocol

from dattri_bench.records import Records
from dattri_core import FittedMethod, Method, Task, World

Array = np.ndarray[Any, Any]
OWN, SOLVED = "self_influence", "solved_self_influence"
"""What a record says of self-influence: as the method gives it, and where it was solved for."""


class Attributing(Protocol):
    """How a method is asked in a world: by itself, or sharing what others have computed."""

    def attribute(self, made: Any, task: Task) -> Attribution:
        """Return its scores and what they took."""
        ...

    def fit(self, made: Method, task: Task) -> FittedMethod:
        """Return it on the train set."""
        ...


@frozen(eq=False)
class Alone:
    """Every method by itself, so that its seconds are its own."""

    world: World

    def attribute(self, made: Any, task: Task) -> Attribution:
        """Return its scores and what they took."""
        return attribute(made, task, self.world)

    def fit(self, made: Method, task: Task) -> FittedMethod:
        """Return it on the train set."""
        return made.fit(task, self.world.train, progress=False)


class Answers:
    """Scores and self-influence of an entrant in a world: from disk, or computed when asked for.

    Args:
        made: The method.
        world: Whose test set is attributed to its train set.
        task: Gives the trained models; called when scores have to be computed.
        records: Where they are kept.
        address: Under which.
        attributing: How the method is asked.
    """

    def __init__(
        self,
        made: Any,
        world: Any,
        task: Callable[[], Task],
        records: Records,
        address: str,
        attributing: Attributing,
    ) -> None:
        self._attributing = attributing
        self._made, self._world, self._records, self._address = made, world, records, address
        self._ask = task
        self._task: Task | None = None
        self._run: Attribution | None = None
        self._values: Array | None = None
        self._error: Exception | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Return seconds, peak memory and notes of the attribution."""
        return self._records.read("attributions", self._address) or {}

    def scores(self) -> Array:
        """Return ``[n_train, n_test]``, float64, read-only: all metrics look at the same array."""
        if self._error is not None:
            raise self._error  # what failed once is not tried again for the next metric
        if self._values is None:
            try:
                self._values = self._kept() if self.facts else None
                if self._values is None:
                    self._values = self._computed()
            except Exception as error:
                self._error = error
                raise
        return self._values

    def self_influence(self, solves: bool = False) -> tuple[Array | None, str]:
        """Return ``[n_train]``, read-only, or None and why the method has none.

        Args:
            solves: Also where each train example takes an iterative solve over the train set. What
                came of it is no answer without: metrics give the same in any order.
        """
        self.scores()  # so that there is a record to add to
        facts = self.facts
        key = SOLVED if solves and is_iterative(self._made) else OWN
        known = facts.get(key)
        kept = self._records.self_influence(self._address) if known else None
        if known is not None and (known["note"] or kept is not None):
            return (None if known["note"] else _shut(kept)), known["note"]
        fitted = None if self._run is None else self._run.fitted
        if fitted is None and isinstance(self._made, Method):
            fitted = self._attributing.fit(self._made, self.task())
        before = 0 if fitted is None else fitted.train.reads
        found = self_influence(self._made, fitted, self.task(), self._world, solves=solves)
        passes = None if fitted is None else (fitted.train.reads - before) / len(fitted.train)
        if found.values is not None:
            self._records.keep_self_influence(self._address, found.values)
        added = {
            "seconds": found.seconds,
            "passes": passes,
            "note": found.note,
            "notes": list(found.notes),
        }
        self._records.write("attributions", self._address, {**facts, key: added})
        return _shut(found.values), found.note

    def said(self, solves: bool) -> dict[str, Any]:
        """Return `facts` for the record of a metric that asked for self-influence so."""
        facts = dict(self.facts)
        solved = facts.pop(SOLVED, None)
        return facts if solved is None or not solves else {**facts, OWN: solved}

    def of_other(self, task: Task) -> Array:
        """Return the scores of the same method for another trained model of the world.

        A method that weighs checkpoints by their learning rates gives each of them, where the task
        has none, the weight 1.
        """
        asked = referenced(self._made, _weighed(self._made, task), self._world)
        return _plain(attribute(self._made, asked, self._world).scores.values)

    def task(self) -> Task:
        """Return what the method is asked about."""
        if self._task is None:
            self._task = referenced(self._made, self._ask(), self._world)
        return self._task

    def _kept(self) -> Array | None:
        scores = self._records.scores(self._address)
        return None if scores is None else _plain(scores.values)

    def _computed(self) -> Array:
        run = self._attributing.attribute(self._made, self.task())
        self._run = run
        self._records.keep_scores(self._address, run.scores)
        known = self.facts  # of scores too large to be kept
        facts: dict[str, Any] = {
            "seconds": run.seconds,
            "peak_bytes": run.peak,
            "passes": None if run.passes is None else asdict(run.passes),
            "notes": list(run.notes),
            **{key: known[key] for key in (OWN, SOLVED) if key in known},
        }
        self._records.write("attributions", self._address, facts)
        return _plain(run.scores.values)


def _weighed(made: Any, task: Task) -> Task:
    lacking = any(checkpoint.learning_rate is None for checkpoint in task.checkpoints)
    if not (follows_run(made) and lacking):
        return task
    changed = copy.copy(task)
    changed.checkpoints = tuple(evolve(c, learning_rate=1.0) for c in task.checkpoints)
    return changed


def _plain(values: Any) -> Array:
    array: Array = np.asarray(values.cpu() if hasattr(values, "cpu") else values, dtype=np.float64)
    _shut(array)
    return array


def _shut(array: Array | None) -> Array | None:
    """Return an array that no metric can write to, and so change the number of the next one."""
    if array is not None:
        array.setflags(write=False)
    return array
