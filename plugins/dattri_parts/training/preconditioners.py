"""Matrices near to the inverse Hessian of a `Convex` objective on its whole train set.

They set how fast an optimum is found, and nothing of where it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dattri_core import NumericsError
from dattri_parts.training.convex import Convex

Precondition = Callable[[Tensor], Tensor]
LARGEST = 10_000
"""Weights of a model up to which its Hessian is formed and factored: 400 MB in single precision."""


def kronecker(objective: Convex, point: Tensor) -> Precondition:
    """Return (B x A + l2)^-1 with A = mean f f^T and B the mean Hessian in the outputs.

    Exact for the squared error. Source: Martens and Grosse 2015, K-FAC, section 3 (1503.05671).

    Args:
        objective: With equal weights 1 / n.
        point: Where, ``[O, d]``.
    """
    width = objective.features.shape[1]
    inner = point.new_zeros(width, width)
    outer = point.new_zeros(objective.outputs, objective.outputs)
    n = len(objective.features)
    for features, hessians in objective.curvatures(point):
        inner.addmm_(features.T, features / n)
        outer += hessians.sum(0) / n
    low, left = torch.linalg.eigh(outer)
    high, right = torch.linalg.eigh(inner)
    scale = low.clamp_min(0)[:, None] * high.clamp_min(0) + objective.l2

    def apply(slopes: Tensor) -> Tensor:
        solved: Tensor = left @ ((left.T @ slopes @ right) / scale) @ right.T
        return solved

    return apply


def factored(objective: Convex, point: Tensor) -> Precondition:
    """Return (H + l2)^-1 with H the Hessian at a point, by its Cholesky factor.

    The factor is in single precision, which a preconditioner needs no more than, or in double
    where H + l2 is too near to singular for that.

    Raises:
        NumericsError: H + l2 is singular in double precision too.
    """
    for dtype in (torch.float32, torch.float64):
        factor, failed = torch.linalg.cholesky_ex(_hessian(objective, point, dtype))
        if not failed:
            return _solve_with(factor)
    raise NumericsError(
        f"optimum: the Hessian of {objective.size} weights plus l2 = {objective.l2} cannot be "
        "factored; scale the features, or give a larger l2"
    )


def _solve_with(factor: Tensor) -> Precondition:
    def apply(slopes: Tensor) -> Tensor:
        columns = slopes.flatten(1).T.to(factor.dtype)
        return torch.cholesky_solve(columns, factor).T.to(slopes.dtype).reshape(slopes.shape)

    return apply


def _hessian(objective: Convex, point: Tensor, dtype: torch.dtype) -> Tensor:
    outputs, width = point.shape
    hessian = torch.zeros(outputs, width, outputs, width, dtype=dtype, device=point.device)
    n = len(objective.features)
    for features, hessians in objective.curvatures(point):
        rows = features.to(dtype)
        for a in range(outputs):
            for b in range(a + 1):
                weighted = rows * (hessians[:, a, b, None] / n).to(dtype)
                hessian[a, :, b] += weighted.T @ rows
    for a in range(outputs):
        for b in range(a):
            hessian[b, :, a] = hessian[a, :, b]  # each block is symmetric
    hessian = hessian.reshape(outputs * width, -1)
    hessian.diagonal().add_(objective.l2)
    return hessian
