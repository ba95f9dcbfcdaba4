"""The cosine of the angle between a train row and a test row."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen
from torch import Tensor

from dattri_core import Block, Scored, Side


@frozen
class Cosine:
    """S_ij = <A phi_i, B psi_j> / (|A phi_i| |B psi_j|), taken after all stages; 0 for a zero row.

    Without stages this is Grad-Cos (Charpiat et al. 2019, arXiv 2102.13085, equation 2). In
    [-1, 1]; it has the sign of an influence but not its scale.
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
        scale = train.norm.unsqueeze(1) * test.norm.unsqueeze(0)
        cosines = total / scale.where(scale > 0, scale.new_ones(()))
        return Scored(cosines.where(scale > 0, cosines.new_zeros(())).clamp(-1, 1))
