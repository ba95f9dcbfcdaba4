"""The largest eigenvalue of M A, for symmetric A and positive definite M, by products only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dattri_core import NumericsError, RandomStream
from dattri_parts.solvers.krylov import Apply


def largest_relative_eigenvalue(
    apply: Apply,
    near: Apply,
    size: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    steps: int = 8,
) -> float:
    """Return an estimate of the largest |eigenvalue| of M A, seldom more than a tenth too low.

    Lanczos in the inner product <x, y>_M = x^T M y, in which A M is symmetric: the largest Ritz
    value plus what its residual leaves open. Source: Golub and Van Loan 2013, section 8.7.

    Args:
        apply: A, one vector at a time.
        near: M, one vector at a time.
        size: d.
        dtype: Of the vectors; float32 or better.
        device: Of the vectors.
        steps: Products with A, at most d.

    Raises:
        NumericsError: A product is not finite, or M is not positive definite.
    """
    generator = RandomStream(0, "krylov").generator("pencil")
    found = torch.randn(1, size, generator=generator, dtype=torch.float64).to(device, dtype)
    lefts, rights = found[:0], found[:0]  # x_k and M x_k, of length 1 in M
    steps = min(steps, size)
    matrix = torch.zeros(steps, steps, dtype=torch.float64)
    rest = 0.0

    def rounding() -> float:
        return 100 * torch.finfo(dtype).eps * float(matrix.abs().max())

    for step in range(steps):
        turned = near(found)
        rest = _length(found, turned, rounding())
        if rest == 0:
            break  # the span is invariant
        lefts = torch.cat([lefts, found / rest])
        rights = torch.cat([rights, turned / rest])
        found = apply(rights[step:])
        column = rights @ found[0]
        matrix[: step + 1, step] = matrix[step, : step + 1] = column.double().cpu()
        found = found - column @ lefts
        found = found - (rights @ found[0]) @ lefts  # what rounding left of the first
    else:
        rest = _length(found, near(found), rounding())
    matrix = matrix[: len(lefts), : len(lefts)]
    values, turn = torch.linalg.eigh(matrix)
    at = int(values.abs().argmax())
    return float(values[at].abs() + rest * turn[-1, at].abs())


def _length(vector: Tensor, turned: Tensor, rounding: float) -> float:
    """Return the root of <x, M x>, and 0 for what is rounding.

    Raises:
        NumericsError: It is not finite, or M is not positive definite.
    """
    squared = float((vector * turned).sum(dtype=torch.float64))
    if abs(squared) <= rounding**2 and rounding:
        return 0.0
    if not math.isfinite(squared):
        raise NumericsError(
            "preconditioner: a product with M or with the curvature is not finite; look for a "
            "diverged checkpoint"
        )
    if squared < 0 or (squared == 0 and bool(vector.any())):
        raise NumericsError(
            f"preconditioner: <x, M x> is {squared:.3g} for a vector x, expected a positive number "
            "of a positive definite M; give its solver more damping, or take a curvature without "
            "negative eigenvalues ('ggn') for it"
        )
    return math.sqrt(squared)
