"""What one method gave in one world: scores, how well they find wrong labels, time and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from attrs import frozen
from dattri_parts.measuring.attribution import (
    attribute,
    damped,
    self_influence,
    spell_error,
    task_of,
)

from dattri_core import Scores, default_registry

Array = np.ndarray[Any, Any]
Metric = Callable[..., Any]


@frozen(eq=False)
class Outcome:
    """A row of the table.

    Args:
        name: Of the method.
        summary: What it is, in one line.
        formula: Of its score.
        citation: Who published it.
        scores: ``[n_train, n_test]``; None when it failed.
        self_influence: ``[n_train]``, where the method has it.
        self_note: Why it has none.
        by_self: AUROC of wrong labels, ranked by self-influence, high first.
        by_test: AUROC of wrong labels, ranked by the mean score for the test set, low first.
        seconds: To fit and to attribute.
        peak: Bytes; None where it cannot be measured.
        error: Why it failed.
        notes: Warnings, such as a solver that did not converge.
    """

    name: str
    summary: str
    formula: str = ""
    citation: str = ""
    scores: Scores | None = None
    self_influence: Array | None = None
    self_note: str = ""
    by_self: Any = None
    by_test: Any = None
    seconds: float = 0.0
    peak: int | None = None
    error: str = ""
    notes: tuple[str, ...] = ()

    @property
    def best_auroc(self) -> float:
        """Return the higher of the two AUROCs; 0 when there is none."""
        return max((r.value for r in (self.by_self, self.by_test) if r is not None), default=0.0)

    @property
    def suspicion(self) -> Array | None:
        """Return the numbers that rank train examples, suspicious first: ``[n_train]``.

        Self-influence where the method has it and it tells examples apart, else minus the mean
        score for the test set.
        """
        if self.self_influence is not None and not _is_constant(self.self_influence):
            return self.self_influence
        return None if self.scores is None else -_mean(self.scores)

    @property
    def suspicion_name(self) -> str:
        """Return which numbers `suspicion` gives."""
        if self.self_influence is not None and self.suspicion is self.self_influence:
            return "self-influence"
        return "mean harm to the test set"


def run_method(name: str, world: Any, metric: Metric) -> Outcome:
    """Attribute with one registered method; a failure becomes a row, not a crash."""
    recipe = default_registry().recipe(name)
    about: dict[str, Any] = {
        "summary": recipe.summary,
        "formula": recipe.formula,
        "citation": recipe.citation,
    }
    try:
        found = _measure(name, world)
        if found["self_influence"] is not None:
            if _is_constant(found["self_influence"]):
                found["self_influence"] = np.ones(len(world.flipped))
            found["by_self"] = metric(found["self_influence"], world.flipped)
        found["by_test"] = metric(-_mean(found["scores"]), world.flipped)
    except Exception as error:
        return Outcome(name, **about, error=spell_error(error))
    return Outcome(name, **about, **found)


def _measure(name: str, world: Any) -> dict[str, Any]:
    made = damped(name, world.damping, {})
    task = task_of(made, world)
    run = attribute(made, task, world)
    own = self_influence(made, run.fitted, task, world)
    return {
        "scores": run.scores,
        "self_influence": own.values,
        "self_note": own.note,
        "seconds": run.seconds,
        "peak": run.peak,
        "notes": tuple(dict.fromkeys((*run.notes, *own.notes))),
    }


def _is_constant(values: Array) -> bool:
    """Return whether numbers differ by rounding only, as the cosine of a row with itself does.

    They are ties then: the order of their rounding errors is not a ranking.
    """
    return float(np.ptp(values)) <= 1e-5 * float(np.abs(values).max())


def _mean(scores: Scores) -> Array:
    means: Array = scores.mean_over_tests().double().numpy()
    return means
