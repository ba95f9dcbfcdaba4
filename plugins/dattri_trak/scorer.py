"""Inner products of rows of a margin, and what is left to learn of each train example."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen
from torch import Tensor

from dattri_core import Block, Scored, Side


@frozen
class Trak:
    """S_ij = <A phi_i, B psi_j> with the weight Q_i = residual of train example i beside it.

    A fold that needs a weight multiplies them, each reduced over checkpoints by itself: the fold
    ``trak``. Source: Park et al. 2023, TRAK, section 3 (arXiv 2303.14186); Q = diag(1 - p).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"residual"})
    locality: ClassVar[Literal["tile", "column"]] = "tile"
    bilinear: ClassVar[bool] = True
    weighs: ClassVar[bool] = True

    def pair(self, train: Block, test: Block) -> Tensor:
        """Return the inner products ``[B, C]`` of one block."""
        return train.inner(test)

    def finish(self, total: Tensor, train: Side, test: Side) -> Scored:
        """Return the sum over blocks as it is, and the residuals of the train rows."""
        return Scored(total, train.aux["residual"])
