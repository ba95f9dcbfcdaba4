"""L-BFGS for many smooth convex functions at once, each on its own way to its own minimum."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from attrs import define, frozen
from torch import Tensor

from dattri_parts.training.preconditioners import Precondition

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
HISTORY = 10
ROUNDS = 20_000
RISES = 0.8
"""Most slope at the end of a step that rises again, of the slope at its start."""
ROUNDING = 1e-12
"""By how much, relative to itself, a value may rise where the slopes say that it falls."""
SHORTEST = 2.0**-40


@frozen(eq=False)
class Minima:
    """Where the searches ended.

    Args:
        points: ``[M, ...]``.
        norms: Of the gradient there, ``[M]``.
    """

    points: Tensor
    norms: Tensor


@define(eq=False)
class _Pair:
    """Steps s, changes y of the gradients on them, and P y; all 0 for a step that was refused."""

    moved: Tensor
    change: Tensor
    scaled: Tensor
    inverse: Tensor
    """1 / (s y), 0 for a refused step, ``[M]``."""


def minima(
    evaluate: Evaluate,
    starts: Tensor,
    weights: Tensor,
    precondition: Precondition,
    small: float,
) -> Minima:
    """Return the minimum of each of M smooth, strictly convex functions.

    Every round asks for all values and gradients once. A step is taken if the slope at its end
    still falls, or rises less than it fell and the value is no larger (convexity then bounds the
    value), else it is halved. A search that has ended stays where it is, so none depends on how
    many rounds the others take.

    Source: Nocedal and Wright 2006, Numerical Optimization, algorithm 7.4.

    Args:
        evaluate: ``(points [M, ...], weights [M, n]) -> (values [M], gradients [M, ...])``.
        starts: The first points, ``[M, ...]``.
        weights: What tells the functions apart, ``[M, n]``.
        precondition: Multiplies each gradient by a positive definite matrix near to the inverse
            Hessian; linear.
        small: Norm of the gradient at which a search ends.
    """
    shape = starts.shape
    ended = Minima(starts.clone().flatten(1), starts.new_full((len(starts),), torch.inf))
    active = torch.arange(len(starts), device=starts.device)
    point, step = starts.flatten(1), starts.new_ones(len(starts))

    def slopes(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, gradient = evaluate(points.reshape(-1, *shape[1:]), weights)
        return value, gradient.flatten(1), precondition(gradient).flatten(1)

    value, gradient, scaled = slopes(point, weights)
    gain = torch.ones_like(step)
    pairs: deque[_Pair] = deque(maxlen=HISTORY)
    for _ in range(ROUNDS):
        norm = torch.linalg.vector_norm(gradient, dim=1)
        going = (norm > small) & (step > SHORTEST)
        ended.points[active], ended.norms[active] = point, norm
        if not going.any():
            break
        if not going.all():  # those that have ended leave
            active, point, step, weights = (t[going] for t in (active, point, step, weights))
            value, gradient, scaled, gain = (t[going] for t in (value, gradient, scaled, gain))
            for pair in pairs:
                pair.moved, pair.change = pair.moved[going], pair.change[going]
                pair.scaled, pair.inverse = pair.scaled[going], pair.inverse[going]
        direction = -_quasi_newton(gradient, scaled, gain, pairs)
        moved = step[:, None] * direction
        there = slopes(point + moved, weights)
        before, after = _dot(gradient, direction), _dot(there[1], direction)
        lower = there[0] <= value + ROUNDING * value.abs()
        taken = (after <= 0) | ((after <= -RISES * before) & lower)
        change, change_scaled = there[1] - gradient, there[2] - scaled
        curved = _dot(moved, change)
        taken &= curved > 0
        inverse = torch.where(taken, 1 / curved, 0.0)
        pairs.append(_Pair(moved, change, change_scaled, inverse))
        gain = torch.where(taken, curved / _dot(change, change_scaled), gain)
        step = torch.where(taken, 1.0, step / 2)
        column = taken[:, None]
        point = torch.where(column, point + moved, point)
        value = torch.where(taken, there[0], value)
        gradient = torch.where(column, there[1], gradient)
        scaled = torch.where(column, there[2], scaled)
    return Minima(ended.points.reshape(shape), ended.norms)


def _quasi_newton(gradient: Tensor, scaled: Tensor, gain: Tensor, pairs: deque[_Pair]) -> Tensor:
    """Return the two-loop product of the inverse Hessian's estimate with each gradient.

    P is linear, so P of what the first loop leaves is a combination of P g and each P y.
    """
    left, made, weights = gradient, scaled, []
    for pair in reversed(pairs):
        weights.append((pair.inverse * _dot(pair.moved, left))[:, None])
        left = left - weights[-1] * pair.change
        made = made - weights[-1] * pair.scaled
    made = made * gain[:, None]
    for pair, weight in zip(pairs, reversed(weights), strict=True):
        made = made + (weight - (pair.inverse * _dot(pair.change, made))[:, None]) * pair.moved
    return made


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(1)
