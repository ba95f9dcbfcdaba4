"""Tuning: a damping chosen on train subsets that no reported number uses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from dattri_parts.choices import outside, value_of
from dattri_parts.measuring.attribution import heard, spell_error

from dattri_core import (
    DattriError,
    InputError,
    Method,
    MetricResult,
    NumericsError,
    Task,
    as_damping,
)

Array = np.ndarray[Any, Any]
CHOOSING = 1_000_003
"""Added to the seed of the metric that chooses, so that it draws other subsets."""


def protocol(subsets: int | None, reported: int | None, metric: str) -> str:
    """Return in words how dampings were chosen."""
    return (
        f"Damping of each method that has one: the value with the best {metric} on {subsets} train "
        f"subsets drawn for choosing alone; reported on {reported} others, drawn independently. "
        "Seconds are those of the chosen value and do not include the search."
    )


def try_dampings(
    made: Method,
    task: Task,
    world: Any,
    dampings: Sequence[Any],
    measure: Callable[[Array], MetricResult],
) -> dict[str, Any]:
    """Return the record of a search: the value of the metric at each damping, and the chosen one.

    Args:
        made: The method.
        task: What it is asked about.
        world: Its train and test set.
        dampings: Numbers, or ``{"relative": x}``.
        measure: ``scores [n_train, n_test] -> result``.

    Raises:
        NumericsError: No damping gave scores.
    """
    fitted = made.fit(task, world.train, progress=False)
    tried: list[dict[str, Any]] = []
    results: list[tuple[float, Any]] = []
    for damping, scores in zip(dampings, _swept(fitted, world.test, dampings), strict=True):
        found: dict[str, Any] = {"damping": damping}
        try:
            values = scores() if callable(scores) else scores
            result = measure(np.asarray(values.values.cpu(), dtype=np.float64))
        except (DattriError, RuntimeError, ValueError) as error:
            found["error"] = spell_error(error)
        else:
            found |= {"value": result.value, "low": result.low, "high": result.high}
            results.append((result.value * (1 if result.higher_is_better else -1), damping))
        tried.append(found)
    if not results:
        raise NumericsError(
            f"tuning: none of the dampings {json.dumps(list(dampings))} gave a number; the first "
            f"said: {tried[0]['error']}"
        )
    best = max(results, key=lambda pair: pair[0])[1]  # the first of equals
    return {"chosen": best, "tried": tried}


def _swept(fitted: Any, test: Any, dampings: Sequence[Any]) -> list[Any]:
    """Return the scores at each damping, from one pass over the train set where that works.

    One damping that fails fails the pass; then each is tried alone, when it is called.
    """
    with heard():
        try:
            keys = [as_damping(damping) for damping in dampings]
            return list(fitted.sweep(test, damping=keys).values())
        except DattriError:
            return [
                lambda damping=damping: fitted.with_(damping=damping).attribute(test)
                for damping in dampings
            ]


def dampings_of(text: str) -> tuple[Any, ...]:
    """Return the dampings of ``damping=1e-3,1e-2,{"relative":0.1}``.

    Raises:
        InputError: It is not spelled so.
    """
    name, _, values = text.partition("=")
    found = [value_of(word) for word in outside(values, ",") if word]
    if name != "damping" or not found:
        raise InputError(
            f"bench: --tune {text!r}; give damping= and the values to try, as in "
            "--tune damping=1e-3,1e-2,1e-1"
        )
    for damping in found:
        if isinstance(damping, str):
            raise InputError(f"bench: --tune got the damping {damping!r}, expected a number")
        as_damping(damping)
    return tuple(dict.fromkeys(found)) if all(map(_is_number, found)) else tuple(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def spell_damping(damping: Any) -> str:
    """Return a damping as text."""
    if isinstance(damping, Mapping):
        return f"{damping['relative']:g} of the mean eigenvalue"
    return f"{damping:g}"
