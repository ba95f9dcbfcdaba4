"""Optima of one convex model on many parts of its train set, each from the optimum on all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from dattri_core import Loss, NumericsError, labels_of, map_tensors, parse_bytes, take
from dattri_parts.training.convex import Convex
from dattri_parts.training.linear_head import LinearHead, check_convex, linear_head
from dattri_parts.training.optimum import Optimum
from dattri_parts.training.preconditioners import LARGEST, Precondition, factored, kronecker
from dattri_parts.training.quasi_newton import HISTORY, minima
from dattri_parts.training.run import StateDict
from dattri_parts.training.sequential import with_threads

MOST = 64
"""Models whose searches go on together: enough for products of matrices at full speed."""


@frozen(eq=False)
class Optima:
    """A convex model on its features, its optimum on all examples, and a preconditioner there.

    The Hessian of the objective on all examples is factored once, at its optimum, and used by every
    search: to leave out one example changes it by about 1 / n.

    Args:
        optimum: How near.
        head: The model.
        objective: Its loss on the features.
        full: W at the optimum on all examples, ``[O, d]``.
        precondition: Near to the inverse Hessian there.
    """

    optimum: Optimum
    head: LinearHead
    objective: Convex
    full: Tensor
    precondition: Precondition

    def states(self, indices: Sequence[Tensor]) -> list[StateDict]:
        """Return the model's state at the optimum on each set of positions ``[k]``.

        Raises:
            NumericsError: A gradient is larger than asked for where rounding ends the search.
        """
        objective, device = self.objective, self.full.device
        workers = torch.get_num_threads() if device.type == "cpu" else 1
        size = _batch_size(objective, workers, parse_bytes(None, device))
        size = min(size, math.ceil(len(indices) / min(workers, len(indices))))
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        with with_threads(1 if device.type == "cpu" else None), ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(self._solve, parts))
        return [self.head.state(point) for points in found for point in points]

    def _solve(self, indices: Sequence[Tensor]) -> Tensor:
        weights = self.full.new_zeros(len(indices), len(self.objective.features))
        for row, index in zip(weights, indices, strict=True):
            row[index.to(row.device)] = 1 / len(index)
        starts = self.full.expand(len(indices), *self.full.shape)
        return _solved(self.objective, self.optimum, starts, weights, self.precondition)


def prepare(build: Callable[[int], nn.Module], loss: Loss, optimum: Optimum, data: Any) -> Optima:
    """Return the optimum on all examples, and what makes others quick to find from it.

    Args:
        build: Makes a model, under a seed, with a linear head as its only trained layer.
        loss: ``cross-entropy`` or ``squared-error``.
        optimum: How near.
        data: A nest of tensors on the device, labels last.

    Raises:
        InputError: The model or the loss is of another kind.
        NumericsError: No optimum was found.
    """
    check_convex(loss)
    data = map_tensors(lambda t: t.double() if t.is_floating_point() else t, data)
    head = linear_head(build, loss, take(data, slice(0, 2)))
    features, labels = head.features(loss, data), labels_of(data)
    objective = Convex(loss, features, labels, head.layer.out_features, optimum.l2)
    start = features.new_zeros(1, objective.outputs, features.shape[1])
    weights = features.new_full((1, len(features)), 1 / len(features))
    near = kronecker(objective, start[0])
    (full,) = _solved(objective, optimum, start, weights, near)
    dense = objective.size <= LARGEST
    precondition = (factored if dense else kronecker)(objective, full)
    return Optima(optimum, head, objective, full, precondition)


def _solved(
    objective: Convex,
    optimum: Optimum,
    starts: Tensor,
    weights: Tensor,
    precondition: Precondition,
) -> Tensor:
    with torch.no_grad():
        found = minima(objective.evaluate, starts, weights, precondition, optimum.gradient_norm)
    for norm, kept in zip(found.norms, weights, strict=True):
        if not norm <= optimum.gradient_norm:
            raise NumericsError(
                f"optimum: the gradient of the model on {int((kept > 0).sum())} examples stays at "
                f"the norm {norm:.2e}, and {optimum.gradient_norm:.2e} was asked for; scale the "
                "features, give a larger l2 or a larger gradient_norm"
            )
    return found.points


def _batch_size(objective: Convex, workers: int, budget: int) -> int:
    """Return how many models a core may search for at once: pairs of L-BFGS, weights, outputs."""
    copies = 3 * HISTORY + 16
    each = 8 * (copies * objective.size + 2 * len(objective.features))
    return max(1, min(MOST, budget // (workers * each)))
