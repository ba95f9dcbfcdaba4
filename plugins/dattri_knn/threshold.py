"""KNN-Shapley with a radius in place of a number of neighbours: linear in the train rows."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import Block, Scored, Side
from dattri_knn.columns import column_parts, distances_from, guess
from dattri_knn.distances import DISTANCES, Distance, needs_of, partial
from dattri_knn.values import equal_values


@frozen
class ThresholdKNNShapley:
    """S_ij = Shapley value of i for v(S) = mean of 1[y_k = y_j] over the near rows of S.

    Near is within the threshold. Exact, and nothing is sorted. No rows within the threshold are a
    guess among the labels of the train set, v = 1 / number of labels; the values of a column add up
    to v(train set) less that, and rows beyond the threshold have the value 0.

    Source: Wang et al. 2023, Threshold KNN-Shapley: A Linear-Time and Privacy-Friendly Approach to
    Data Valuation (arXiv 2308.15709).

    Args:
        threshold: Largest distance of a neighbour.
        distance: See the scorer ``knn-shapley``; with the default, 1 - cos, thresholds are the same
            for rows of any size.
    """

    threshold: float = field(default=0.5)
    distance: Distance = field(default="cosine", validator=validators.in_(DISTANCES))
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
        labels, answers = train.aux["label"].unsqueeze(1), test.aux["label"]
        empty = guess(train)
        values = torch.empty_like(total)
        for part in column_parts(total):
            gains = (labels == answers[part]).double()
            far = distances_from(total, train, test, self.distance, part).T
            inside = far <= self.threshold
            values[:, part] = equal_values(gains, inside, empty).to(values.dtype)
        return Scored(values)
