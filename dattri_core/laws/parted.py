"""A toy train set that is read in parts, as several processes read theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core.batch import Batch, take
from dattri_core.blocks import Block
from dattri_core.laws.forwarding import standing_before
from dattri_core.laws.problems import DenseProblem
from dattri_core.laws.worlds import cast
from dattri_core.protocols import CurvatureKind, Problem, RowKind
from dattri_core.rows import Rows

BORDERS = (0, 4, 4)
"""Where parts begin; the last ends with the train set. The second one is empty."""


@frozen(eq=False)
class PartedProblem:
    """A `SharedProblem` that reads its parts one after another; all else is that of the whole.

    Args:
        whole: The problem.
        span: Of a part, the range of its examples.
    """

    whole: DenseProblem
    span: tuple[int, int] | None = None

    def __new__(cls, whole: DenseProblem, span: tuple[int, int] | None = None) -> PartedProblem:
        """Return one that shows all members of the whole."""
        return standing_before(cls, whole, "whole")

    def __getattr__(self, name: str) -> Any:
        """Return a member of the whole, for who reads no class."""
        return getattr(self.whole, name)

    def summed(self, read: Callable[[Problem], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return the sum of what is read of each part."""
        if self.span is not None:
            return read(self)
        total: dict[str, Tensor] = {}
        for span in pairwise((*BORDERS, self.whole.n_train)):
            for name, values in read(evolve(self, span=span)).items():
                total[name] = total[name] + values if name in total else values
        return total

    def own_part(self) -> PartedProblem:
        """Return itself: one process reads all parts."""
        return self

    def rows(
        self, index: Tensor | None = None, *, kind: RowKind = "loss", draw: int = 0
    ) -> Iterator[Rows]:
        """Read the rows of the part, or those of given positions."""
        return self.whole.rows(self._index(index), kind=kind, draw=draw)

    def stream(
        self,
        sink: Callable[[str, Block, Tensor], None],
        *,
        kind: RowKind = "loss",
        draw: int = 0,
        index: Tensor | None = None,
    ) -> None:
        """Hand over the rows of the part, or those of given positions."""
        self.whole.stream(sink, kind=kind, draw=draw, index=self._index(index))

    def batches(self) -> Iterator[Batch]:
        """Read the examples of the part in order."""
        first, last = self.span or (0, self.whole.n_train)
        for start in range(first, last, self.whole.batch):
            part = slice(start, min(start + self.whole.batch, last))
            yield cast(take(self.whole.train, part), self.whole.dtype)

    def product(self, vectors: Rows, kind: CurvatureKind, index: Tensor | None = None) -> Rows:
        """Return the part's share of the mean curvature times every vector."""
        part = self._index(index)
        if index is not None or part is None:
            return self.whole.product(vectors, kind, part)
        if not len(part):
            return vectors.scale(torch.zeros(len(vectors), dtype=vectors.dtype))
        share = torch.full((len(vectors),), len(part) / self.whole.n_train, dtype=vectors.dtype)
        return self.whole.product(vectors, kind, part).scale(share)

    def _index(self, index: Tensor | None) -> Tensor | None:
        if index is not None or self.span is None:
            return index
        return torch.arange(*self.span)
