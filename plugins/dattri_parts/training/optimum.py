"""The optimum of a strictly convex objective: what training leads to, without its noise."""

from __future__ import annotations

import math
from typing import Any

from attrs import Attribute, field, frozen

from dattri_core import InputError


def _positive(_: Any, attribute: Attribute[float], value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(
            f"optimum: {attribute.name} is {value!r}, expected a number above 0; without a penalty "
            "the objective of a classifier has no one minimum"
        )


@frozen
class Optimum:
    """The minimum of mean loss over the train set plus (l2 / 2) |theta|^2, in float64.

    All trained parameters, biases too, are in theta. The objective is l2-strongly convex, so a
    model with gradient g is at most |g| / l2 from its optimum, whatever the data and the start.

    Args:
        l2: Weight of the penalty, above 0.
        gradient_norm: Largest norm of the gradient of a model that is accepted.

    Raises:
        InputError: A number is not above 0.
    """

    l2: float = field(validator=_positive)
    gradient_norm: float = field(default=1e-9, validator=_positive)
