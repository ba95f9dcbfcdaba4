"""KNN-Shapley for the probability that the nearest rows give the right label."""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import Block, Scored, Side
from dattri_knn.columns import Column, guess, solve_columns
from dattri_knn.distances import DISTANCES, Distance, needs_of, partial
from dattri_knn.values import mean_values


@frozen
class SoftLabelKNNShapley:
    """S_ij = Shapley value of i for v(S) = mean of 1[y_k = y_j] over the K nearest of S.

    Exact. A set of fewer than K rows is divided by their number and not by K, and no rows are a
    guess among the labels of the train set, v = 1 / number of labels; the values of a column add up
    to v(train set) less that. Ties are those of the scorer ``knn-shapley``.

    Source: Wang and Jia 2023, A Note on "Efficient Task-Specific Data Valuation for Nearest
        Neighbor
    Algorithms" (arXiv 2304.04258).

    Args:
        neighbours: K.
        distance: See the scorer ``knn-shapley``.
    """

    neighbours: int = field(default=5, validator=validators.ge(1))
    distance: Distance = field(default="l2", validator=validators.in_(DISTANCES))
    locality: ClassVar[Literal["tile", "column"]] = "column"

    @property
    def needs(self) -> frozenset[str]:
        """Return the label, and the norm where the distance reads it."""
        return needs_of(self.distance)

    def pair(self, train: Block, test: Block) -> Tensor:
        """Return what adds up over blocks, ``[B, C]``."""
        return partial(train, test, self.distance)

    def finish(self, total: Tensor, train: Side, test: Side) -> Scored:
        """Return the Shapley values of all train rows for each test row."""
        empty = guess(train)

        def game(column: Column) -> Tensor:
            gains = (column.labels == column.label).double()
            return mean_values(gains, empty, self.neighbours)

        return Scored(solve_columns(game, total, train, test, self.distance))
