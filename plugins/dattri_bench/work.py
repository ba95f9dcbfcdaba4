"""The work in one world: scores once for all metrics, dampings chosen, ensembles trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import attrs
import numpy as np
from attrs import field, frozen
from dattri_parts.measuring.attribution import spell_error, task_of
from dattri_parts.measuring.threads import threads

from dattri_bench.answers import Alone, Answers, Attributing
from dattri_bench.cells import Cell
from dattri_bench.counted import counted
from dattri_bench.ensembles import NAMESPACE, ensemble_task, members, train_members
from dattri_bench.records import Records, address_of
from dattri_bench.request import Entrant, Measure, Request
from dattri_bench.tuning import CHOOSING, try_dampings
from dattri_core import (
    DattriError,
    Evidence,
    InputError,
    Method,
    MetricResult,
    NumericsError,
    Outcomes,
    Task,
    World,
    default_registry,
    method,
    take,
)

Array = np.ndarray[Any, Any]


@frozen(eq=False)
class Work:
    """Computes cells of a world that was made.

    Args:
        request: What is asked.
        records: Where answers are kept.
        seed: Of the world.
        wrong: Share of its wrong labels.
        world: The world.
        write: Records the answer of a cell.
        attributing: How methods are asked; by default each by itself.
    """

    request: Request
    records: Records
    seed: int
    wrong: float
    world: World
    write: Callable[[Cell, Mapping[str, Any]], None]
    attributing: Attributing = field(
        default=attrs.Factory(lambda self: Alone(self.world), takes_self=True)
    )
    _found: dict[str, Any] = field(factory=dict, init=False)  # outcomes and ensembles, made once

    def do(self, cells: list[Cell]) -> None:
        """Compute and record cells, one entrant after another."""
        with threads(self.world.threads):
            _warm_up(self.world)
            groups: dict[str, list[Cell]] = {}
            for cell in cells:
                groups.setdefault(address_of(cell.attribution), []).append(cell)
            for group in groups.values():
                self._group(group)

    def _group(self, cells: list[Cell]) -> None:
        """Compute the cells of one entrant, whose scores are computed once."""
        first = cells[0]
        try:
            made, tuning = self._chosen(first)
        except Exception as error:
            for cell in cells:
                self.write(cell, {"error": spell_error(error)})
            return
        answers = Answers(
            made,
            self.world,
            lambda: self._task(first.entrant, made),
            self.records,
            address_of(first.attribution),
            self.attributing,
        )
        for cell in cells:
            self.write(cell, {"tuning": tuning, **self._measured(cell, answers)})

    def _measured(self, cell: Cell, answers: Answers) -> dict[str, Any]:
        """Return the answer of a cell: a result, or the error."""
        try:
            evidence, models = counted(self._evidence(cell.measure, answers, self.seed))
            started = time.perf_counter()
            result = checked(cell.measure.metric.measure(evidence))
            seconds = time.perf_counter() - started
        except Exception as error:  # a method or metric may be anyone's: its failure is a row
            return {"error": spell_error(error)}
        return {
            "result": plain_result(result),
            "metric_seconds": seconds,
            "models": models(),
            "attribution": answers.said("self-influence" in cell.measure.metric.needs),
        }

    def _evidence(self, measure: Measure, answers: Answers, seed: int) -> Evidence:
        needs = measure.metric.needs
        if needs & {"labels", "mislabelled"} and self.world.true_labels is None:
            raise InputError(
                f"bench: the metric {measure.choice.name!r} reads class labels, and the examples "
                "of this setting have none"
            )
        scores = answers.scores()
        own, note = None, ""
        if needs & {"self-influence", "mislabelled"}:
            own, note = answers.self_influence("self-influence" in needs)
        if "self-influence" in needs and own is None:
            raise InputError(f"bench: no self-influence: {note}")
        return self._evidence_of(scores, own, needs, answers.of_other, seed)

    def _evidence_of(
        self,
        scores: Array,
        own: Array | None,
        needs: frozenset[str],
        attribute: Callable[[Task], Array] | None,
        seed: int,
    ) -> Evidence:
        outcomes = self._outcomes() if "retraining" in needs else None
        return Evidence(scores, own, self.world, outcomes, attribute, seed)

    def _outcomes(self) -> Outcomes:
        if "outcomes" not in self._found:
            store = default_registry().resolve("ground_truth", "retraining")
            self._found["outcomes"] = store(self.request.retrained, self.world.retraining)
        outcomes: Outcomes = self._found["outcomes"]
        return outcomes

    def _task(self, entrant: Entrant, made: Any) -> Task:
        """Return the trained models that an entrant is asked about; trains those that are missing.

        They are the same for all entrants of as many models.
        """
        if entrant.models <= 1:
            return task_of(made, self.world)
        name = f"{entrant.models} models"
        if name not in self._found:
            wanted = members(
                self.world.retraining.n_train, entrant.models, self.request.trained_on, self.seed
            )
            paths = train_members(self.world, wanted, self.request.retrained)
            self._found[name] = ensemble_task(self.world, paths)
        task: Task = self._found[name]
        return task

    def _chosen(self, cell: Cell) -> tuple[Any, dict[str, Any] | None]:
        """Return the method at its damping, and how that was chosen."""
        request, entrant = self.request, cell.entrant
        damping = self.world.damping if request.damping is None else request.damping
        if entrant.retrains:
            return self._supplied(entrant), None
        if cell.attribution["tuning"] is None:
            return entrant.made(damping, self.seed), None
        record = self._tuned(cell)
        fields = {**entrant.fields(self.seed), "damping": record["chosen"]}
        return method(entrant.choice.name, **fields), record

    def _supplied(self, entrant: Entrant) -> Any:
        """Return a method that trains models with what trains them.

        Unless the choice sets a seed, it is one whose subsets no metric draws.
        """
        fields: dict[str, Any] = {"ground_truth": self._outcomes()}
        if "seed" not in entrant.choice.fields:
            fields["seed"] = NAMESPACE + self.seed
        return attrs.evolve(entrant.made(None), **fields)

    def _tuned(self, cell: Cell) -> dict[str, Any]:
        """Return the search of an entrant's damping, made in the world without wrong labels."""
        request = self.request
        clean = {**cell.attribution["world"], "wrong": 0.0}
        if self.wrong:  # the same seed and size, before labels were changed
            known = self.records.read("worlds", address_of(request.world(self.seed, 0.0)))
            clean["fingerprint"] = None if known is None else known["fingerprint"]
            damping = None if known is None else known["damping"]
            address = address_of(request.attribution(clean, cell.entrant, damping))
        else:
            address = address_of(cell.attribution)
        record = self.records.read("tuning", address)
        if record is not None:
            return record
        if self.wrong:
            raise InputError("bench: no damping could be chosen in the world without wrong labels")
        assert request.chooser is not None
        chooser = request.chooser.metric
        made = cell.entrant.made(self.world.damping, self.seed)
        started = time.perf_counter()
        record = try_dampings(
            made,
            self._task(cell.entrant, made),
            self.world,
            request.dampings,
            lambda scores: checked(
                chooser.measure(
                    self._evidence_of(scores, None, chooser.needs, None, self.seed + CHOOSING)
                )
            ),
        )
        record["seconds"] = time.perf_counter() - started
        self.records.write("tuning", address, record)
        return record


def _warm_up(world: World) -> None:
    """Attribute two examples, so that the first method does not pay for loading code."""
    few = slice(0, 2)
    with suppress(DattriError):
        Method().attribute(world.task, take(world.train, few), take(world.test, few))


def checked(result: MetricResult) -> MetricResult:
    """Return a result as it is.

    Raises:
        NumericsError: A number of it is not finite, as JSON and a reader need.
    """
    numbers = (result.value, result.low, result.high, result.chance)
    if not all(math.isfinite(number) for number in numbers):
        raise NumericsError(f"bench: the metric gave {result!r}, which is not finite")
    return result


def plain_result(result: MetricResult) -> dict[str, Any]:
    """Return a result as JSON-ready data."""
    ceiling = result.ceiling
    return {
        "value": float(result.value),
        "low": float(result.low),
        "high": float(result.high),
        "chance": float(result.chance),
        "ceiling": None if ceiling is None else _finite(ceiling),
        "confidence": float(result.confidence),
        "higher_is_better": bool(result.higher_is_better),
        "per_test": None if result.per_test is None else list(result.per_test),
        "bounds": None if result.bounds is None else [_finite(end) for end in result.bounds],
    }


def _finite(number: float) -> float | None:
    """Return a number that JSON holds; None for one that is infinite."""
    return float(number) if math.isfinite(number) else None
