"""Fitting a linear layer with an L2 penalty on the features of a train set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import define, frozen
from torch import Tensor
from torch.nn.functional import linear

from dattri_core import ConvergenceWarning, MemoryBudgetError, NumericsError, format_bytes
from dattri_rps.lbfgs import minimise

Criterion = Callable[[Tensor, Any], Tensor]


@frozen(eq=False)
class Part:
    """Some train examples: f in float64, ``[B, ..., D]``, and the batch for the criterion."""

    features: Tensor
    batch: Any


@frozen(eq=False)
class Refit:
    """A layer that was fitted.

    Args:
        weight: W, ``[O, D]``.
        stats: ``iterations``, ``gradient_norm`` as it was reached and ``representer_gap``: the
            largest |sum_i S_ij - W f_j| over train examples j and outputs, relative to |W f|.
    """

    weight: Tensor
    stats: dict[str, float]


@define(eq=False)
class _Objective:
    """F(W) = 1/n sum_i L(W f_i) + l2 |W|^2, with its gradient."""

    parts: Sequence[Part]
    criterion: Criterion
    l2: float
    n: int

    def __call__(self, weight: Tensor) -> tuple[float, Tensor]:
        value, gradient = self.loss(weight)
        return value + self.l2 * float(weight.square().sum()), gradient + 2 * self.l2 * weight

    def loss(self, weight: Tensor) -> tuple[float, Tensor]:
        """Return the mean loss and its gradient ``[O, D]``."""
        total, gradient = 0.0, torch.zeros_like(weight)
        for part in self.parts:
            with torch.enable_grad():
                outputs = linear(part.features, weight).requires_grad_()
                summed = self.criterion(outputs, part.batch).sum()
                (slope,) = torch.autograd.grad(summed, outputs)
            total += float(summed.detach()) / self.n
            gradient += slope.flatten(0, -2).T @ part.features.flatten(0, -2) / self.n
        return total, gradient


def refit(
    parts: Sequence[Part],
    criterion: Criterion,
    outputs: int,
    *,
    l2: float,
    gradient_norm: float,
    iterations: int,
    memory: int,
) -> Refit:
    """Return the W that minimises 1/n sum_i L(W f_i) + l2 |W|^2, by L-BFGS in float64.

    It starts at 0 and is preconditioned with (E[f f^T] + 2 l2 I)^-1, the inverse Hessian of squared
    errors, for which one step is enough.

    Args:
        parts: The train set.
        criterion: ``(outputs, batch) -> [B]``.
        outputs: O.
        l2: Of the penalty, not halved.
        gradient_norm: Stop at |dF/dW| <= gradient_norm * |2 l2 W|.
        iterations: Most steps.
        memory: Bytes for the matrix of features.

    Raises:
        MemoryBudgetError: The matrix E[f f^T] does not fit.
        NumericsError: Features or the fitted layer are not finite.
    """
    first = parts[0].features
    width, n = first.shape[-1], sum(len(part.features) for part in parts)
    need = 3 * 8 * width * width
    if need > memory:
        raise MemoryBudgetError(
            f"source 'last-layer': the second moment of {width} features takes "
            f"{format_bytes(need)} of a budget of {format_bytes(memory)}; give a larger memory="
        )
    objective = _Objective(parts, criterion, l2, n)
    found = minimise(
        objective,
        first.new_zeros(outputs, width),
        small=lambda weight, gradient: (
            float(gradient.norm()) <= gradient_norm * 2 * l2 * float(weight.norm())
        ),
        precondition=_preconditioner(parts, n, l2),
        iterations=iterations,
    )
    weight = found.point
    if not torch.isfinite(weight).all():
        raise NumericsError(
            "source 'last-layer': the refitted layer is not finite; look for features that "
            "overflow, or a larger l2"
        )
    reached = float(found.gradient.norm()) / max(2 * l2 * float(weight.norm()), 1e-300)
    gap = _representer_gap(objective, weight)
    if not found.converged:
        warnings.warn(
            f"source 'last-layer': the gradient is {reached:.1e} of that of the penalty after "
            f"{found.iterations} steps of L-BFGS, expected at most {gradient_norm:.1e}; sums of "
            f"representer values miss the outputs by up to {gap:.1e} of the largest; give a "
            f"larger l2 (now {l2:.1e}), more iterations (now {iterations}), or a larger "
            "gradient_norm",
            ConvergenceWarning,
            stacklevel=2,
        )
    stats = {"iterations": found.iterations, "gradient_norm": reached, "representer_gap": gap}
    return Refit(weight, stats)


def _preconditioner(parts: Sequence[Part], n: int, l2: float) -> Callable[[Tensor], Tensor]:
    """Return the product with (E[f f^T] + 2 l2 I)^-1 from the right."""
    width = parts[0].features.shape[-1]
    moment = parts[0].features.new_zeros(width, width)
    for part in parts:
        rows = part.features.flatten(0, -2)
        moment.addmm_(rows.T, rows, alpha=1 / n)
    if not torch.isfinite(moment).all():
        raise NumericsError(
            "source 'last-layer': the features of the train set are not finite; look for a "
            "diverged checkpoint"
        )
    # Rounding leaves the moment of features that depend on each other not quite semidefinite.
    floor = 1e-14 * float(moment.diagonal().sum())
    moment.diagonal().add_(2 * l2 + floor)
    factor = torch.linalg.cholesky(moment)
    return lambda gradient: torch.cholesky_solve(gradient.T, factor).T


def _representer_gap(objective: _Objective, weight: Tensor) -> float:
    """Return by how much -1/(2 l2 n) sum_i (dL_i/doutputs) f_i^T f_j misses W f_j, at most."""
    _, gradient = objective.loss(weight)
    apart = weight + gradient / (2 * objective.l2)
    gap, largest = 0.0, 1e-300
    for part in objective.parts:
        gap = max(gap, float(linear(part.features, apart).abs().max()))
        largest = max(largest, float(linear(part.features, weight).abs().max()))
    return gap / largest
