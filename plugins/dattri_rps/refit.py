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

ROUND = 40
"""Steps of L-BFGS after which it is preconditioned anew, where it has come to."""
PROBES = 4
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
            outputs = linear(part.features, weight).requires_grad_()
            with torch.enable_grad():
                summed = self.criterion(outputs, part.batch).sum()
                (slope,) = torch.autograd.grad(summed, outputs)
            total += float(summed.detach()) / self.n
            rows = part.features.flatten(0, -2)
            gradient.addmm_(slope.flatten(0, -2).T, rows, alpha=1 / self.n)
        return total, gradient

    def preconditioner(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the product from the right with (E[w f f^T] + 2 l2 I)^-1 at some W.

        w is the mean curvature of the criterion in one output, of each example and position.

        Raises:
            NumericsError: A feature is not finite.
        """
        width = weight.shape[1]
        moment = weight.new_zeros(width, width)
        for part in self.parts:
            rows = part.features.flatten(0, -2)
            curved = self._curvature(linear(part.features, weight), part.batch).flatten()
            moment.addmm_(rows.T * curved, rows, alpha=1 / self.n)
        if not torch.isfinite(moment).all():
            raise NumericsError(
                "source 'last-layer': the features of the train set are not finite; look for a "
                "diverged checkpoint"
            )
        # Rounding leaves the moment of features that depend on each other not quite semidefinite.
        floor = 1e-14 * float(moment.diagonal().sum())
        moment.diagonal().add_(2 * self.l2 + floor)
        # Written down, because it is applied at every step and need not be accurate.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        return lambda gradient: gradient @ inverse

    def _curvature(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return an estimate of 1/O tr d2L/doutputs2 at each position, ``[B, ...]``."""
        signs = torch.Generator().manual_seed(0)
        total = outputs.new_zeros(outputs.shape[:-1])
        with torch.enable_grad():
            free = outputs.requires_grad_()
            summed = self.criterion(free, batch).sum()
            (slope,) = torch.autograd.grad(summed, free, create_graph=True)
            for _ in range(PROBES if slope.requires_grad else 0):
                drawn = torch.randint(2, outputs.shape, generator=signs).to(outputs) * 2 - 1
                (product,) = torch.autograd.grad(
                    slope, free, drawn, retain_graph=True, materialize_grads=True
                )
                total += (product * drawn).mean(-1).clamp_min(0) / PROBES
        return total.detach()


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

    It starts at 0 and is preconditioned with an inverse that is that of the Hessian for squared
    errors, where one step is enough.

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

    def small(weight: Tensor, gradient: Tensor) -> bool:
        return float(gradient.norm()) <= gradient_norm * 2 * l2 * float(weight.norm())

    weight, taken, going = first.new_zeros(outputs, width), 0, True
    while going:
        most = min(ROUND, iterations - taken)
        found = minimise(
            objective,
            weight,
            small=small,
            precondition=objective.preconditioner(weight),
            iterations=most,
        )
        weight, taken = found.point, taken + found.iterations
        going = not found.converged and found.iterations == most and taken < iterations
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
            f"{taken} steps of L-BFGS, expected at most {gradient_norm:.1e}; sums of "
            f"representer values miss the outputs by up to {gap:.1e} of the largest; give a "
            f"larger l2 (now {l2:.1e}), more iterations (now {iterations}), or a larger "
            "gradient_norm",
            ConvergenceWarning,
            stacklevel=2,
        )
    stats = {"iterations": taken, "gradient_norm": reached, "representer_gap": gap}
    return Refit(weight, stats)


def _representer_gap(objective: _Objective, weight: Tensor) -> float:
    """Return by how much -1/(2 l2 n) sum_i (dL_i/doutputs) f_i^T f_j misses W f_j, at most."""
    _, gradient = objective.loss(weight)
    apart = weight + gradient / (2 * objective.l2)
    gap, largest = 0.0, 1e-300
    for part in objective.parts:
        gap = max(gap, float(linear(part.features, apart).abs().max()))
        largest = max(largest, float(linear(part.features, weight).abs().max()))
    return gap / largest
