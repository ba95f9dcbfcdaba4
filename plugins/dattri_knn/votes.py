"""Votes: what the two scorers share whose nearest rows count by weights."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Protocol

from dattri_core import Block, SpecError
from dattri_knn.columns import Column
from dattri_knn.distances import Distance, Weights, partial, weights_of


class Vote(Protocol):
    """A scorer of rows of which the K nearest count, by weights of their distance."""

    @property
    def neighbours(self) -> int:
        """Return K."""
        ...

    @property
    def distance(self) -> Distance:
        """Return which distance says what is near."""
        ...

    @property
    def weights(self) -> Weights:
        """Return how rows count."""
        ...

    @property
    def bandwidth(self) -> float | None:
        """Return the unit of the distance."""
        ...


def pair(vote: Vote, train: Block, test: Block) -> Tensor:
    """Return what adds up over blocks, ``[B, C]``.

    Raises:
        SpecError: Weights are asked of ``"dot"``, which is no distance.
    """
    if vote.weights != "uniform" and vote.distance == "dot":
        raise SpecError(
            f"scorer {type(vote).__name__}: weights={vote.weights!r} are of a distance, and "
            "'dot' is none (it may be negative); use the distance 'cosine' or 'l2', or "
            "weights='uniform'"
        )
    return partial(train, test, vote.distance)


def weighted(vote: Vote, gains: Tensor, column: Column) -> Tensor:
    """Return the gains of the rows of a column times their weights, ``[C, n]``."""
    if vote.weights == "uniform":
        return gains
    return gains * weights_of(column.distances, vote.weights, vote.neighbours, vote.bandwidth)
