"""Scores of train examples that are the same for every test example."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import frozen
from torch import Tensor

from dattri_core import Block, Scored, Side


@frozen
class TrainLoss:
    """S_ij = loss_i, for every j: of a source that attaches the ``loss`` of its examples.

    **Sign.** A train example lowers its own loss the more, the larger its gradient is: its
    influence on itself is never negative. Scores that know train examples alone stand in for its
    size, so that a large loss is a large score. For finding wrong labels it is the suspicion as it
    is, like self-influence.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"loss"})
    locality: ClassVar[Literal["tile", "column"]] = "tile"

    def pair(self, train: Block, test: Block) -> Tensor:
        """Return zeros ``[B, C]``: no test row is read."""
        return _nothing(train, test)

    def finish(self, total: Tensor, train: Side, test: Side) -> Scored:
        """Return the losses in every column."""
        return Scored(total + train.aux["loss"].unsqueeze(1))


@frozen
class TrainNorm:
    """S_ij = |A phi_i|, for every j: the norm of a train row after all stages.

    Of gradients, |<g_i, h>| <= |g_i| |h|: the norm bounds what a train example can do to any test
    example. The sign is that of `TrainLoss`. Averaged over checkpoints this is GraNd (Paul et al.
    2021, Deep Learning on a Data Diet, arXiv 2107.07075, definition 2.1).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"norm"})
    locality: ClassVar[Literal["tile", "column"]] = "tile"

    def pair(self, train: Block, test: Block) -> Tensor:
        """Return zeros ``[B, C]``: no test row is read."""
        return _nothing(train, test)

    def finish(self, total: Tensor, train: Side, test: Side) -> Scored:
        """Return the norms in every column; they run over all blocks."""
        assert train.norm is not None
        return Scored(total + train.norm.unsqueeze(1))


def _nothing(train: Block, test: Block) -> Tensor:
    return train.take(slice(0, 1)).flat().new_zeros(len(train), len(test))
