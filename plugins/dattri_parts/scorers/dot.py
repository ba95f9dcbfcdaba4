"""The inner product of a train row and a test row."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen
from torch import Tensor

from dattri_core import Block, Scored, Side


@frozen
class Dot:
    """S_ij = <A phi_i, B psi_j>: the scorer of influence functions and of TracIn.

    With B = (H + damping I)^-1, S_ij / n is the first-order change of the test target when train
    example i is removed (Koh and Liang 2017, arXiv 1703.04730, equation 2, with the sign turned so
    that helpful is positive).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    locality: ClassVar[Literal["tile", "column"]] = "tile"
    bilinear: ClassVar[bool] = True

    def pair(self, train: Block, test: Block) -> Tensor:
        """Return the inner products ``[B, C]`` of one block."""
        return train.inner(test)

    def finish(self, total: Tensor, train: Side, test: Side) -> Scored:
        """Return the sum over blocks as it is."""
        return Scored(total)
