"""Penalised mean losses of linear models on one set of features, many train sets at once.

Axes: n examples, M models, O outputs, d features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import Loss

NUMBERS = 2**20
"""Outputs of all models that are held at once; a few passes over them stay in the cache."""


@frozen(eq=False)
class Convex:
    """F_m(W) = sum_i weights_mi loss(W f_i, y_i) + (l2 / 2) |W|^2 for models m, in float64.

    Args:
        loss: Its criterion is convex in the outputs.
        features: f, ``[n, d]``.
        labels: y, ``[n]`` or ``[n, O]``.
        outputs: O.
        l2: Weight of the penalty.
    """

    loss: Loss
    features: Tensor
    labels: Tensor
    outputs: int
    l2: float

    @property
    def size(self) -> int:
        """Return the number of weights of a model, O d."""
        return self.outputs * self.features.shape[1]

    def evaluate(self, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return F_m ``[M]`` and its gradient ``[M, O, d]``.

        Args:
            points: W of each model, ``[M, O, d]``.
            weights: ``[M, n]``.
        """
        models, flat = len(points), points.flatten(0, 1)
        value = self.l2 / 2 * points.flatten(1).square().sum(1)
        slope = self.l2 * flat
        for part in self._parts(models):
            features = self.features[part]
            with torch.enable_grad():
                out = (features @ flat.T).reshape(-1, self.outputs).requires_grad_()
                losses = self.loss.criterion(out, (None, self._labels(part, models)))
                losses = losses * weights[:, part].T.flatten()
                (pulled,) = torch.autograd.grad(losses.sum(), out)
            value += losses.detach().reshape(-1, models).sum(0)
            slope.addmm_(pulled.reshape(len(features), -1).T, features)
        return value, slope.reshape(points.shape)

    def curvatures(self, point: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (features ``[b, d]``, Hessians of the loss in the outputs ``[b, O, O]``)."""
        assert self.loss.factor is not None  # the shipped losses have one
        for part in self._parts(self.outputs):
            features = self.features[part]
            batch = (None, self._labels(part, 1))
            columns = self.loss.factor(features @ point.T, batch)  # [K, b, O]
            yield features, torch.einsum("kbo,kbp->bop", columns, columns)

    def _labels(self, part: slice, models: int) -> Tensor:
        labels = self.labels[part]
        return labels.repeat_interleave(models, 0)

    def _parts(self, models: int) -> Iterator[slice]:
        step = max(64, NUMBERS // (models * self.outputs))
        for start in range(0, len(self.features), step):
            yield slice(start, start + step)
