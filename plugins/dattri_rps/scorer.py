"""Inner products of last-layer gradients, in the unit of the outputs that they add up to."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen
from torch import Tensor

from dattri_core import Block, Scored, Side


@frozen
class Representer:
    """S_ij = scale_i <A phi_i, B psi_j>, where scale = 1 / (2 l2 n) comes with the train row.

    Of the source ``last-layer`` without stages these are representer values: they add up over the
    train set to the output that column j asks for. Source: Yeh et al. 2018, Representer Point
    Selection (arXiv 1811.09720), theorem 3.1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"scale"})
    locality: ClassVar[Literal["tile", "column"]] = "tile"
    terms: ClassVar[bool] = True

    def pair(self, train: Block, test: Block) -> Tensor:
        """Return the inner products ``[B, C]`` of one block."""
        return train.inner(test)

    def finish(self, total: Tensor, train: Side, test: Side) -> Scored:
        """Multiply the rows of the sum over blocks by their scale."""
        return Scored(total * train.aux["scale"].unsqueeze(1))
