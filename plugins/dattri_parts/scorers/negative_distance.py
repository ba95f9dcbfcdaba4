"""Minus the distance of a train row from a test row."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import Block, Scored, Side

EQUAL = 1e-13
"""A squared distance below this part of the squared norms is one of equal rows, rounded."""


@frozen
class NegativeDistance:
    """S_ij = -|A phi_i - B psi_j|: the nearest train row is the most helpful; 0 for an equal row.

    A baseline for features, whose rows are the same on both sides. Without features, a distance of
    gradients ranks by the sizes of theirs as much as by their directions.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    locality: ClassVar[Literal["tile", "column"]] = "tile"

    def pair(self, train: Block, test: Block) -> Tensor:
        """Return the squared distances ``[B, C]`` within one block, in float64 until the end."""
        left, right = train.flat(), test.flat()
        wide = torch.promote_types(left.dtype, torch.float32)
        left, right = left.double(), right.double()
        squares = left.square().sum(1, keepdim=True) + right.square().sum(1)
        apart = squares.addmm(left, right.T, alpha=-2)
        return apart.masked_fill_(apart <= EQUAL * squares, 0).to(wide)

    def finish(self, total: Tensor, train: Side, test: Side) -> Scored:
        """Return minus the root of the sum over blocks."""
        return Scored(-total.sqrt())
