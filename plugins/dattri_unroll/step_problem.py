"""The batch of one step as a curvature sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from attrs import define, field
from torch import Tensor

from dattri_core import Block, CurvatureKind, Problem, RandomStream, RowKind, Rows, Space


@define(eq=False)
class StepProblem:
    """A `Problem` whose train set is the batch of a step.

    Rows of the loss are asked for twice, by the scores and by most curvatures, and so are kept
    where they fit.

    Args:
        problem: Of the whole train set, at the checkpoint that the step was taken from.
        batch: Positions of the batch's examples, ``[B]``, an example as often as it was drawn.
        limit: Bytes of rows that may be kept.
    """

    problem: Problem
    batch: Tensor
    limit: int
    _kept: list[Rows] | None = field(default=None, init=False)

    @property
    def space(self) -> Space:
        """Return the space after the projector."""
        return self.problem.space

    @property
    def n_train(self) -> int:
        """Return the size of the batch."""
        return len(self.batch)

    @property
    def device(self) -> torch.device:
        """Return where the rows live."""
        return self.problem.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the rows."""
        return self.problem.dtype

    @property
    def random(self) -> RandomStream:
        """Return the stream of the step."""
        return self.problem.random

    @property
    def memory(self) -> int:
        """Return the bytes that a fit may use."""
        return self.problem.memory

    def rows(
        self, index: Tensor | None = None, *, kind: RowKind = "loss", draw: int = 0
    ) -> Iterator[Rows]:
        """Read the rows of the batch, or of the examples at some places of it.

        `Rows.index` is the position in the train set.
        """
        if kind != "loss" or index is not None:
            yield from self.problem.rows(self._positions(index), kind=kind, draw=draw)
            return
        if self._kept is not None:
            yield from self._kept
            return
        kept, size = [], 0
        for part in self.problem.rows(self.batch):
            size += part.nbytes
            if size <= self.limit:
                kept.append(part)
            yield part
        if size <= self.limit:
            self._kept = kept

    def stream(
        self,
        sink: Callable[[str, Block, Tensor], None],
        *,
        kind: RowKind = "loss",
        draw: int = 0,
        index: Tensor | None = None,
    ) -> None:
        """Hand the rows of `rows` to ``sink(name, block, index)`` block by block."""
        if kind != "loss" or index is not None or self._kept is None:
            self.problem.stream(sink, kind=kind, draw=draw, index=self._positions(index))
            return
        for part in self._kept:
            for name, block in part.blocks.items():
                sink(name, block, part.index)

    def product(self, vectors: Rows, kind: CurvatureKind, index: Tensor | None = None) -> Rows:
        """Return the mean curvature of the batch, or of some places of it, times every vector."""
        return self.problem.product(vectors, kind, self._positions(index))

    def _positions(self, index: Tensor | None) -> Tensor:
        return self.batch if index is None else self.batch[index.cpu()]
