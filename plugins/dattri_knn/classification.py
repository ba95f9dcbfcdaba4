"""KNN-Shapley for classes: what a train row adds to the vote of the nearest for the label."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import Block, Scored, Side
from dattri_knn.columns import Column, solve_columns
from dattri_knn.distances import (
    DISTANCES,
    WEIGHTS,
    Distance,
    Weights,
    needs_of,
)
from dattri_knn.values import additive_values
from dattri_knn.votes import pair, weighted


@frozen
class KNNShapley:
    """S_ij = Shapley value of i for v(S) = 1/K sum_(k in K nearest of S) w_k 1[y_k = y_j].

    Exact. Values of a column add up to v of the whole train set, whose number of rows may be less
    than K. Train rows whose distances are equal in float32 are taken in the order of the train set.
    The value of a train row for the test set is the mean of its row of scores. With weights, w_k is
    a function of the distance alone and is not divided by the sum over S, so that the recursion
    stays exact; v is then divided by K all the same.

    Source: Jia et al. 2019, Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms,
    theorem 1 (arXiv 1908.08619).

    Args:
        neighbours: K.
        distance: ``"l2"``, ``"l1"``, ``"cosine"`` (1 - cos) or ``"dot"`` (the largest inner product
            is the nearest).
        weights: ``"uniform"``: 1; ``"inverse"``: 1 / (1 + d / h); ``"gaussian"``: exp(-(d / h)^2 /
            2).
        bandwidth: h of the weights; None: for each test row, the distance of its K-th nearest, or
            where that is 0 (K rows equal to the test row) the smallest distance that is not 0.
    """

    neighbours: int = field(default=5, validator=validators.ge(1))
    distance: Distance = field(default="l2", validator=validators.in_(DISTANCES))
    weights: Weights = field(default="uniform", validator=validators.in_(WEIGHTS))
    bandwidth: float | None = field(default=None, validator=validators.optional(validators.gt(0)))
    locality: ClassVar[Literal["tile", "column"]] = "column"

    @property
    def needs(self) -> frozenset[str]:
        """Return the label, and the norm where the distance reads it."""
        return needs_of(self.distance)

    def pair(self, train: Block, test: Block) -> Tensor:
        """Return what adds up over blocks, ``[B, C]``.

        Raises:
            SpecError: Weights are asked of ``"dot"``, which is no distance.
        """
        return pair(self, train, test)

    def finish(self, total: Tensor, train: Side, test: Side) -> Scored:
        """Return the Shapley values of all train rows for each test row."""

        def game(column: Column) -> Tensor:
            gains = (column.labels == column.label).double()
            return additive_values(weighted(self, gains, column), self.neighbours)

        return Scored(solve_columns(game, total, train, test, self.distance))
