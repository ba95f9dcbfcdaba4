"""Several checkpoints of a run as one train set, as a curvature sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core import Block, CurvatureKind, Problem, RandomStream, RowKind, Rows, Space


@frozen(eq=False)
class SegmentProblem:
    """A `Problem` whose examples are those of every checkpoint: a curvature of it is their mean.

    Example i at checkpoint c has the position c n + i. One checkpoint besides the first is alive at
    a time.

    Args:
        first: The n examples at the first checkpoint.
        count: Of checkpoints.
        read: Gives the problem of checkpoint 1, 2 and so on.
    """

    first: Problem
    count: int
    read: Callable[[int], Problem]

    @property
    def space(self) -> Space:
        """Return the space of all checkpoints."""
        return self.first.space

    @property
    def n_train(self) -> int:
        """Return the number of examples times that of checkpoints."""
        return self.count * self._each

    @property
    def device(self) -> torch.device:
        """Return where the rows live."""
        return self.first.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the rows."""
        return self.first.dtype

    @property
    def random(self) -> RandomStream:
        """Return the stream of the first checkpoint."""
        return self.first.random

    @property
    def memory(self) -> int:
        """Return the bytes that a fit may use."""
        return self.first.memory

    def rows(
        self, index: Tensor | None = None, *, kind: RowKind = "loss", draw: int = 0
    ) -> Iterator[Rows]:
        """Read the rows of all checkpoints one after another, or those at some positions."""
        for at, problem, local in self._parts(index):
            for part in problem.rows(local, kind=kind, draw=draw):
                yield evolve(part, index=part.index + at * self._each)

    def stream(
        self,
        sink: Callable[[str, Block, Tensor], None],
        *,
        kind: RowKind = "loss",
        draw: int = 0,
        index: Tensor | None = None,
    ) -> None:
        """Hand the rows of `rows` to ``sink(name, block, index)`` block by block."""
        for at, problem, local in self._parts(index):
            start = at * self._each

            def shifted(name: str, block: Block, where: Tensor, start: int = start) -> None:
                sink(name, block, where + start)

            problem.stream(shifted, kind=kind, draw=draw, index=local)

    def product(self, vectors: Rows, kind: CurvatureKind, index: Tensor | None = None) -> Rows:
        """Return the mean curvature of all examples, or of some positions, times every vector."""
        total: Tensor | None = None
        count = 0
        for _, problem, local in self._parts(index):
            weight = self._each if local is None else len(local)
            part = problem.product(vectors, kind, local).flat() * weight
            total = part if total is None else total.add_(part)
            count += weight
        assert total is not None
        return Rows.from_flat(self.space, total / count, vectors.index, vectors.aux)

    @property
    def _each(self) -> int:
        return self.first.n_train

    def _parts(self, index: Tensor | None) -> Iterator[tuple[int, Problem, Tensor | None]]:
        """Yield the place of each checkpoint, its problem, and the positions asked of it."""
        for at in range(self.count):
            local = None if index is None else index[index // self._each == at] % self._each
            if local is None or len(local):
                yield at, self.first if at == 0 else self.read(at), local
