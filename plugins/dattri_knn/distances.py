"""Distances of train rows from test rows: what adds up over blocks, and what becomes of the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dattri_core import Block

Distance = Literal["l2", "l1", "cosine", "dot"]
DISTANCES: tuple[Distance, ...] = ("l2", "l1", "cosine", "dot")
ZERO = 1e-13
"""A squared distance below this part of the rows' squared norms is one of equal rows, rounded."""
ROUNDINGS = 8
"""1 - cos below so many roundings is that of rows of one direction; it has no digits anyway."""


def partial(train: Block, test: Block, distance: Distance) -> Tensor:
    """Return what adds up over blocks, ``[B, C]``.

    That is |x - t|^2 for ``"l2"``, |x - t|_1 for ``"l1"``, and <x, t> for the other two. Products
    are taken in float64 and rounded once, so that equal rows are equally far whatever their batch.
    """
    left, right = train.flat(), test.flat()
    wide = torch.promote_types(left.dtype, torch.float32)
    if distance == "l1":
        return torch.cdist(left.to(wide), right.to(wide), p=1)
    left, right = left.double(), right.double()
    if distance != "l2":
        return (left @ right.T).to(wide)
    squares = left.square().sum(1, keepdim=True) + right.square().sum(1)
    apart = squares.addmm(left, right.T, alpha=-2)
    return apart.masked_fill_(apart <= squares.mul_(ZERO), 0).to(wide)


def whole(total: Tensor, scale: Tensor | None, distance: Distance) -> Tensor:
    """Return the distances from the sum over blocks; a row of zeros is at a right angle.

    L2 and L1 are what they are called, ``"cosine"`` is 1 - cos, 0 where it is rounding, and
    ``"dot"`` is -<x, t>, which is no distance but orders rows like one.

    Args:
        total: The sum, of any shape; it is overwritten.
        scale: |x| |t| of the same shape, for ``"cosine"``.
        distance: Which one.
    """
    if distance == "l1":
        return total
    if distance == "l2":
        return total.clamp_min_(0).sqrt_()
    if distance == "dot":
        return total.neg_()
    assert scale is not None
    apart = 1 - torch.where(scale > 0, total / scale, 0)
    least = ROUNDINGS * torch.finfo(total.dtype).eps
    return apart.masked_fill_(apart <= least, 0).clamp_(max=2)


def needs_of(distance: Distance) -> frozenset[str]:
    """Return what a scorer of labelled rows reads: their labels, for ``"cosine"`` their norms."""
    return frozenset({"label", "norm"} if distance == "cosine" else {"label"})


# --- weights --------------------------------------------------------------------------------------
Weights = Literal["uniform", "inverse", "gaussian"]
WEIGHTS: tuple[Weights, ...] = ("uniform", "inverse", "gaussian")
_KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverse": lambda d: 1 / (1 + d),
    "gaussian": lambda d: torch.exp(-d.square() / 2),
}


def weights_of(
    distances: Tensor, weights: Weights, neighbours: int, bandwidth: float | None
) -> Tensor:
    """Return the weight of every train row for each test row, ``[C, n]``; 1 at distance 0.

    With h the bandwidth, ``"inverse"`` is 1 / (1 + d / h) and ``"gaussian"`` exp(-(d / h)^2 / 2).

    Args:
        distances: From the nearest to the farthest, ``[C, n]``.
        weights: Which of the two.
        neighbours: K.
        bandwidth: h; None: the distance of the K-th nearest row, or where that is 0 the smallest
            that is not, so that the unit of distances does not matter.
    """
    if bandwidth is None:
        last = min(neighbours, distances.shape[1]) - 1
        width = distances[:, last : last + 1]
        nearest = distances.masked_fill(distances <= 0, torch.inf).amin(1, keepdim=True)
        nearest = nearest.masked_fill(nearest.isinf(), 1)  # all are at distance 0, of weight 1
        width = torch.where(width > 0, width, nearest)
        return _KERNELS[weights](distances / width)
    return _KERNELS[weights](distances / bandwidth)
