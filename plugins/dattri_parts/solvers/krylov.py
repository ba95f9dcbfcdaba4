"""Krylov spaces of a symmetric operator: an orthonormal basis and the operator in it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import NumericsError, RandomStream

KEPT = 0.7
"""Share of its length that a vector keeps in a second pass where that leaves it orthogonal."""

Apply = Callable[[Tensor], Tensor]
"""H v for vectors ``[C, d]``."""


@frozen(eq=False)
class Krylov:
    """V of m orthonormal vectors with H V = V T + rest, T symmetric."""

    basis: Tensor  # V, [m, d]
    matrix: Tensor  # T, [m, m], float64
    rest: float  # length of what the last product left outside of the span


@frozen(eq=False)
class RitzPairs:
    """The Ritz pairs of largest magnitude: H y = mu y up to ``bounds``."""

    values: Tensor  # [k], float64, by falling magnitude
    vectors: Tensor  # [k, d]
    bounds: Tensor  # [k], |H y - mu y|


def krylov(
    apply: Apply, size: int, steps: int, *, dtype: torch.dtype, device: torch.device
) -> Krylov:
    """Return an orthonormal basis of span(q, H q, H^2 q, ...) from a fixed normal vector q.

    Lanczos with full reorthogonalisation, the symmetric case of Arnoldi's method: each product is
    made orthogonal to the last two vectors, then to all, and to all once more where that took much
    of it. Where the span is invariant before ``steps`` vectors (fewer distinct eigenvalues, or a
    null space), a new normal vector goes on with it, so that ``size`` steps span everything.
    Source: Golub and Van Loan 2013, section 10.3.

    Args:
        apply: H, one vector at a time.
        size: d.
        steps: m, at most d.
        dtype: Of the basis; float32 or better.
        device: Of the basis.

    Raises:
        NumericsError: A product is not finite.
    """
    basis = torch.empty(steps, size, dtype=dtype, device=device)
    matrix = torch.zeros(steps, steps, dtype=torch.float64)
    precision, reach, rest = torch.finfo(dtype).eps, 0.0, 0.0
    following = _start(0, basis[:0])
    for step in range(steps):
        basis[step] = following
        known = basis[: step + 1]
        product = apply(known[step:])[0].to(dtype)
        length = float(product.norm())
        if not math.isfinite(length):
            raise NumericsError(
                "Krylov space: a curvature product is not finite; look for a diverged checkpoint"
            )
        reach = max(reach, length)
        near = slice(max(0, step - 1), step + 1)  # of a symmetric H, all of it but rounding
        inside = known[near] @ product
        product = product - inside @ known[near]
        once = float(product.norm())
        again = known @ product
        product -= again @ known
        again[near] += inside
        # The column above the diagonal: below it stands its mirror.
        matrix[: step + 1, step] = again.double().cpu()
        rest = float(product.norm())
        if step + 1 == steps:
            break
        if rest > 100 * precision * reach:
            following = product / rest
            if rest < KEPT * once:  # what is left is rounding in part
                following = _unit(following, known)
        else:
            following = _start(step + 1, known)
    return Krylov(basis, matrix + matrix.triu(1).mT, rest)


def _start(step: int, known: Tensor) -> Tensor:
    generator = RandomStream(0, "krylov").generator(step)
    vector = torch.randn(known.shape[1], generator=generator, dtype=torch.float64).to(known)
    return _unit(_unit(vector / vector.norm(), known), known)


def _unit(vector: Tensor, known: Tensor) -> Tensor:
    """Return a vector made orthogonal to the known ones, at length 1."""
    vector = vector - (known @ vector) @ known
    unit: Tensor = vector / vector.norm()
    return unit


def ritz_pairs(space: Krylov, count: int) -> RitzPairs:
    """Return the ``count`` Ritz pairs of largest magnitude."""
    values, turn = torch.linalg.eigh(space.matrix)
    chosen = values.abs().argsort(descending=True)[:count]
    vectors = turn[:, chosen].mT.to(space.basis) @ space.basis
    return RitzPairs(
        values[chosen].to(space.basis.device),
        vectors,
        (space.rest * turn[-1, chosen].abs()).to(space.basis.device),
    )


def largest_eigenvalue(
    apply: Apply, size: int, *, dtype: torch.dtype, device: torch.device, steps: int = 8
) -> float:
    """Return an estimate of the largest |eigenvalue| of H, seldom more than a tenth too low.

    The largest Ritz value of a short Krylov space plus what its residual leaves open.
    """
    pairs = ritz_pairs(krylov(apply, size, min(steps, size), dtype=dtype, device=device), 1)
    return float(pairs.values.abs()[0] + pairs.bounds[0])
