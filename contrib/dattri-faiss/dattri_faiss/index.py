"""An index of the train rows of a fitted method, searched for the largest inner products."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from attrs import define
from numpy.typing import NDArray

from dattri_core import Extreme, FittedMethod, InputError, Rows, SpecError

SCORERS = ("dot", "cosine")
"""What an index of inner products can serve."""
Vectors = NDArray[np.float32]


@define(eq=False)
class TrainIndex:
    """The rows A g_i of a train set in a FAISS index; made by `build`.

    With the scorer ``cosine`` rows of both sides are normalised after all stages.
    """

    fitted: FittedMethod
    index: Any

    @staticmethod
    def build(fitted: FittedMethod, factory: str = "Flat") -> TrainIndex:
        """Return the index over the train set of a fitted method.

        Args:
            fitted: A method with the scorer ``dot`` or ``cosine``, at one checkpoint.
            factory: What kind of index, as ``faiss.index_factory`` spells it. ``"Flat"`` is exact;
                one that has to be trained is, on all rows, which are then in memory twice.

        Raises:
            SpecError: Another scorer, or several checkpoints.
            InputError: FAISS is not installed.
        """
        faiss = _faiss()
        scorer = fitted.method.to_spec()["scorer"]
        if scorer not in SCORERS:
            raise SpecError(
                f"faiss index: the scorer is {scorer!r}, which is no inner product of two rows; "
                f"use one of {list(SCORERS)}, or fitted.extremes(test, k)"
            )
        index = None
        waiting: list[Vectors] = []
        for vectors in _vectors(fitted.train_rows(), scorer):
            if index is None:
                index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            if index.is_trained:
                index.add(vectors)
            else:
                waiting.append(vectors)
        if index is not None and waiting:
            whole = np.concatenate(waiting)
            index.train(whole)
            index.add(whole)
        return TrainIndex(fitted, index)

    def search(self, test: Any, k: int) -> Extreme:
        """Return the k train examples that help each test example most, as the index finds them.

        Args:
            test: A Dataset, a DataLoader in a fixed order, or a nest of tensors.
            k: How many; fewer come when there are fewer train examples.

        Returns:
            ``Extreme(ids, values)``, ``[k, n_test]`` each, values in float32.

        Raises:
            InputError: k is no number of examples, or an approximate index found fewer than k.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"faiss index: k is {k!r}; give a whole number of at least 1")
        k = min(k, len(self.fitted.train))
        scorer = self.fitted.method.to_spec()["scorer"]
        found = [self.index.search(v, k) for v in _vectors(self.fitted.test_rows(test), scorer)]
        values = np.concatenate([values for values, _ in found])
        positions = np.concatenate([at for _, at in found])
        if (positions < 0).any():
            raise InputError(
                f"faiss index: the search found fewer than k={k} train examples for "
                f"{int((positions < 0).any(1).sum())} queries; search more of the index, such as "
                "index.index.nprobe = 16"
            )
        ids = np.asarray(self.fitted.train.ids)[positions]
        return Extreme(ids.T, torch.from_numpy(values.T.copy()))


def _vectors(rows: Iterable[Rows], scorer: str) -> Iterable[Vectors]:
    """Yield rows as FAISS takes them, ``[B, d]``; a row that vanishes stays zero."""
    for some in rows:
        flat = some.flat()
        if scorer == "cosine":
            norm = flat.norm(dim=1, keepdim=True)
            flat = flat / torch.where(norm > 0, norm, torch.ones_like(norm))
        yield np.ascontiguousarray(flat.float().cpu().numpy())


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise InputError(
            "faiss index: FAISS is not installed; install it with: pip install faiss-cpu"
        ) from error
