"""KNN-Shapley for numbers: what each train row adds to the fit of the mean of the nearest."""

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
from dattri_knn.values import squared_values
from dattri_knn.votes import pair, weighted


@frozen
class KNNShapleyRegression:
    """S_ij = Shapley value of i for v(S) = -(1/K sum_(k in K nearest of S) w_k y_k - y_j)^2.

    Exact. A set of fewer than K rows is divided by K too, so that no rows predict 0 and the values
    of a column add up to y_j^2 + v(train set). Ties and weights are those of the scorer
    ``knn-shapley``.

    Source: Jia et al. 2019, Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms
        (arXiv 1908.08619).

    Args:
        neighbours: K.
        distance: See the scorer ``knn-shapley``.
        weights: See the scorer ``knn-shapley``.
        bandwidth: See the scorer ``knn-shapley``.
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
            gains = weighted(self, column.labels.double(), column)
            return squared_values(gains, column.label.double(), self.neighbours)

        return Scored(solve_columns(game, total, train, test, self.distance))
