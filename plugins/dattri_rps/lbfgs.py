"""L-BFGS for a smooth convex function, down to a gradient at the rounding of its numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from attrs import field, frozen
from torch import Tensor

Function = Callable[[Tensor], tuple[float, Tensor]]
SUFFICIENT, STEEP, LEVEL = 1e-4, 0.9, 0.8
"""Of the slope at the start: the least mean descent of a step, the most slope at its end while it
still falls, and the most while it rises again."""
ROUNDING = 1e-12
"""By how much, relative to itself, a value may rise where the slopes say that it falls."""
TRIALS = 60


@frozen(eq=False)
class Minimum:
    """Where the search ended.

    Args:
        point: The last point.
        gradient: There.
        iterations: Steps that were taken.
        converged: Whether the gradient is as small as was asked.
    """

    point: Tensor
    gradient: Tensor
    iterations: int
    converged: bool


def minimise(
    function: Function,
    start: Tensor,
    *,
    small: Callable[[Tensor, Tensor], bool],
    precondition: Callable[[Tensor], Tensor],
    iterations: int,
    history: int = 20,
) -> Minimum:
    """Return the minimum of a smooth convex function of one tensor.

    Near a minimum the differences of its values are lost in rounding long before those of its
    slopes are, so a step that lowers no value measurably is taken if its slopes say that it does
    (the approximate Wolfe conditions). Source: Nocedal and Wright 2006, Numerical Optimization,
    algorithm 7.4; Hager and Zhang 2005, A New Conjugate Gradient Method with Guaranteed Descent and
    an Efficient Line Search, section 4.

    Args:
        function: ``point -> (value, gradient)``.
        start: The first point; its dtype is that of the search.
        small: ``(point, gradient) -> bool``: whether to stop there.
        precondition: Multiplies by a positive definite matrix near to the inverse Hessian, up to
            its scale.
        iterations: Most steps.
        history: Pairs of steps and changes of the gradient that are kept.
    """
    point, (value, gradient) = start, function(start)
    scaled = precondition(gradient)
    pairs: deque[_Pair] = deque(maxlen=history)
    for done in range(iterations):
        if small(point, gradient):
            return Minimum(point, gradient, done, converged=True)
        direction = -_quasi_newton(gradient, scaled, pairs)
        found = _search(function, point, value, direction, _dot(gradient, direction))
        if found is None:  # no step is told from rounding
            return Minimum(point, gradient, done, converged=False)
        step, value, after = found
        before, scaled = scaled, precondition(after)
        pair = _Pair(step * direction, after - gradient, scaled - before)
        if pair.curved > 0:
            pairs.append(pair)
        point, gradient = point + pair.moved, after
    return Minimum(point, gradient, iterations, small(point, gradient))


@frozen(eq=False)
class _Pair:
    """A step s, the change y of the gradient on it, and M y, M the preconditioner."""

    moved: Tensor
    change: Tensor
    scaled: Tensor
    curved: float = field(init=False)

    @curved.default
    def _curved(self) -> float:
        return _dot(self.moved, self.change)


def _quasi_newton(gradient: Tensor, scaled: Tensor, pairs: deque[_Pair]) -> Tensor:
    """Return the two-loop product of the inverse Hessian's estimate with the gradient.

    M is linear, so M of what the first loop leaves is a combination of M g and each M y.
    """
    left, made, weights = gradient, scaled, []
    for pair in reversed(pairs):
        weights.append(_dot(pair.moved, left) / pair.curved)
        left = left - weights[-1] * pair.change
        made = made - weights[-1] * pair.scaled
    if pairs:
        made = made * (pairs[-1].curved / _dot(pairs[-1].change, pairs[-1].scaled))
    for pair, weight in zip(pairs, reversed(weights), strict=True):
        made = made + (weight - _dot(pair.change, made) / pair.curved) * pair.moved
    return made


def _search(
    function: Function, point: Tensor, value: float, direction: Tensor, slope: float
) -> tuple[float, float, Tensor] | None:
    """Return a step that meets the Wolfe conditions, with value and gradient after it."""
    if not slope < 0:
        return None
    low, high, step = 0.0, float("inf"), 1.0
    for _ in range(TRIALS):
        there, gradient = function(point + step * direction)
        now = _dot(gradient, direction)
        falls = there <= value + SUFFICIENT * step * slope or (
            now <= -LEVEL * slope and there <= value + ROUNDING * abs(value)
        )
        if not falls:  # also where the value is not a number
            high = step
        elif now < STEEP * slope:
            low = step
        else:
            return step, there, gradient
        step = 2 * step if high == float("inf") else (low + high) / 2
    return None


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.flatten(), other.flatten()))
