"""Estimates: values by sampling with a standard error each, and the rule that stops sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from attrs import define, field, frozen, validators

from dattri_core import InputError

Array = np.ndarray[Any, Any]
Utility = Callable[[Array], Array]
"""A game: masks ``[B, n]`` of truth values to utilities ``[B, m]``, more is better."""


@frozen
class Stopping:
    """When sampling ends: when every standard error is small enough, or the budget is spent.

    Args:
        tolerance: Largest standard error of a value that is good enough, in the unit of the
            utility; None: only the budget counts.
        budget: Largest number of train sets whose utility is asked for.
    """

    tolerance: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    budget: int = field(default=10_000, validator=validators.ge(1))


@frozen(eq=False)
class Estimate:
    """Values of n examples for m utilities.

    Args:
        values: ``[n, m]``.
        errors: ``[n, m]``, the standard error of each; 0 where nothing was drawn.
        mean: ``[n]``, the mean over the m utilities: the data value.
        mean_errors: ``[n]``, the standard error of the mean. The m utilities come from the same
            models, so it is not that of m independent numbers.
        draws: Permutations or subsets that were drawn.
        evaluations: Train sets whose utility was asked for, repeated ones counted once per asking.
        stopped: ``"tolerance"``, ``"budget"``, or ``"exact"`` where nothing is drawn.
    """

    values: Array
    errors: Array
    mean: Array
    mean_errors: Array
    draws: int
    evaluations: int
    stopped: str

    def facts(self) -> dict[str, Any]:
        """Return what goes into the provenance of scores, JSON-ready."""
        return {
            "stopped": self.stopped,
            "draws": self.draws,
            "evaluations": self.evaluations,
            "largest_standard_error": float(self.errors.max()),
            "mean_standard_error": float(self.errors.mean()),
            "data_value_standard_errors": self.mean_errors.tolist(),
        }


@define(eq=False)
class Game:
    """A utility that is checked, and has the mean over its columns as one column more.

    Every call must give as many columns as the first.

    Args:
        utility: ``[B, n]`` truth values to ``[B, m]``.
        n: Number of examples.
    """

    utility: Utility
    n: int
    _columns: int | None = field(default=None, init=False)

    def __call__(self, masks: Array) -> Array:
        """Return utilities and their mean, ``[B, m + 1]``, float64.

        Raises:
            InputError: The utility gave another shape, or numbers that are not finite.
        """
        found = np.asarray(self.utility(masks), dtype=np.float64)
        if found.ndim != 2 or len(found) != len(masks) or found.shape[1] == 0:
            raise InputError(
                f"semivalue: the utility gave shape {found.shape} for masks {masks.shape}, "
                f"expected ({len(masks)}, m): a row for each mask, a column for each test example"
            )
        if self._columns is None:
            self._columns = found.shape[1]
        if found.shape[1] != self._columns:
            raise InputError(
                f"semivalue: the utility gave shape {found.shape} for masks {masks.shape}, "
                f"expected ({len(masks)}, {self._columns}): it gave {self._columns} columns "
                "before, one for each test example, and must give as many each time"
            )
        if not np.isfinite(found).all():
            row = int(np.flatnonzero(~np.isfinite(found).all(1))[0])
            raise InputError(
                f"semivalue: the utility of a set of {int(masks[row].sum())} of {self.n} examples "
                f"is {found[row]}; expected finite numbers"
            )
        return np.concatenate([found, found.mean(1, keepdims=True)], axis=1)


def finish(values: Array, errors: Array, draws: int, evaluations: int, stopped: str) -> Estimate:
    """Return an estimate from values and errors whose last column is the mean, ``[n, m + 1]``."""
    return Estimate(
        values=values[:, :-1],
        errors=errors[:, :-1],
        mean=values[:, -1],
        mean_errors=errors[:, -1],
        draws=draws,
        evaluations=evaluations,
        stopped=stopped,
    )


def standard_error(squares: Array, count: Array | int, spread: Array) -> Array:
    """Return the standard error of a mean of independent draws, never below spread / count.

    The usual ``sqrt(squares / (count (count - 1)))`` is 0 for an example whose contribution was
    the same in all draws, though another one may only be rare. A contribution that differs by
    ``spread`` and did not come in ``count`` draws has a chance below 3 / count (the rule of three,
    95 %), so it moves the mean by less than three times spread / count.

    Args:
        squares: Sum of squared deviations from the mean.
        count: Number of draws, 2 or more.
        spread: Largest deviation that any example showed.
    """
    plain = np.sqrt(np.maximum(squares, 0.0) / (count * (count - 1.0)))
    lowest: Array = np.maximum(plain, spread / count)
    return lowest
