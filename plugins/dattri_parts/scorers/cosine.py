"""The cosine of the angle between a train row and a test row."""

from __future__ import annotations

import warnings
from typing import ClassVar, Literal

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import Block, Scored, Side


@frozen
class Cosine:
    """S_ij = <A phi_i, B psi_j> / (|A phi_i| |B psi_j|), taken after all stages; 0 for a zero row.

    Without stages this is Grad-Cos (Charpiat et al. 2019, arXiv 2102.13085, equation 2). In
    [-1, 1]; it has the sign of an influence but not its scale. Where the rows of a query are so
    short that squares or products underflow, a warning says so.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"norm"})
    locality: ClassVar[Literal["tile", "column"]] = "tile"
    bilinear: ClassVar[bool] = True

    def pair(self, train: Block, test: Block) -> Tensor:
        """Return the inner products ``[B, C]`` of one block."""
        return train.inner(test)

    def finish(self, total: Tensor, train: Side, test: Side) -> Scored:
        """Divide by both norms; they run over all blocks."""
        assert train.norm is not None
        assert test.norm is not None
        _warn_of_underflow(total, train.norm, test.norm)
        scale = train.norm.unsqueeze(1) * test.norm.unsqueeze(0)
        cosines = total / scale.where(scale > 0, scale.new_ones(()))
        return Scored(cosines.where(scale > 0, cosines.new_zeros(())).clamp(-1, 1))


def _warn_of_underflow(total: Tensor, train: Tensor, test: Tensor) -> None:
    """Warn where rows are so short that squares or products have lost digits, or are zero.

    Norms of train rows are exact (`measures.without_underflow`); those of queries are roots of sums
    in the dtype of the rows.
    """
    limits = torch.finfo(total.dtype)
    lost = (test > 0) & (test < limits.tiny**0.5)
    zero = test == 0
    if bool(zero.any()):  # a row of zeros has no product either
        lost |= zero & (total != 0).any(0)
    left, right = train[train > 0], test[test > 0]
    if len(left) and len(right):
        least = float(left.min()) * float(right.min())
        lost |= torch.full_like(lost, least < limits.tiny / limits.eps)
    if bool(lost.any()):
        warnings.warn(
            f"scorer 'cosine': rows are so short (a test row has length {float(test.min()):.1e}) "
            f"that squares or products underflow in {total.dtype}: cosines of {int(lost.sum())} "
            "queries may be inexact or zero; use model.double()",
            RuntimeWarning,
            stacklevel=2,
        )
