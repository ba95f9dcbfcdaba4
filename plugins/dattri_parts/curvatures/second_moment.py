"""The operator of a curvature that is the second moment of rows of the train set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core import (
    Block,
    DenseBlock,
    Outlook,
    Problem,
    RandomStream,
    RowKind,
    Rows,
    SharedProblem,
    Space,
    kept,
    summed,
)
from dattri_parts.curvatures.block_spectrum import (
    count_rows,
    require_room,
    spans,
    spectrum_of,
    squares,
)
from dattri_parts.curvatures.eigenbasis import BlockBasis

LARGEST_SPECTRUM = 4096
"""Numbers of a block up to which its eigenvectors are computed: a few seconds each."""


@frozen(eq=False)
class SecondMoment:
    """H = weight sum_i r_i r_i^T over rows that are read when asked for.

    The weight is 1 / n, and 1 / (n draws) for labels that are drawn several times.

    Args:
        problem: The train set.
        kind: Of the rows.
        draws: Of the labels, for kind ``"fisher"``; eigenvectors, for kind ``"leading"``.
        blockwise: H is made of its diagonal blocks alone.
    """

    problem: Problem
    kind: RowKind
    draws: int = 1
    blockwise: bool = False

    @property
    def space(self) -> Space:
        """Return the space of the rows."""
        return self.problem.space

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the rows, float32 at least: sums never run in fewer bits."""
        return torch.promote_types(self.problem.dtype, torch.float32)

    @property
    def memory(self) -> int:
        """Return the bytes that the fit may use."""
        return self.problem.memory

    @property
    def weight(self) -> float:
        """Return the weight of each outer product."""
        return 1 / (self.problem.n_train * self._means)

    @property
    def own(self) -> bool:
        """Return whether the rows are those of the train side, one of each example in order.

        The engine's problem says so by its role; one of other examples, or of a part, does not.
        """
        return self.kind == "loss" and getattr(self.problem, "role", None) == "train"

    @property
    def n_train(self) -> int:
        """Return the number of train examples."""
        return self.problem.n_train

    @property
    def random(self) -> RandomStream:
        """Return the stream of random numbers of the fit."""
        return self.problem.random

    def rows(self) -> Iterator[Rows]:
        """Read all rows, a few at a time."""
        yield from self._read(None)

    def rows_of(self, index: Tensor) -> Iterator[Rows]:
        """Read the rows of the examples at some positions, a few at a time."""
        yield from self._read(index)

    def _read(self, index: Tensor | None) -> Iterator[Rows]:
        for draw in range(self.draws):
            yield from self.problem.rows(index, kind=self.kind, draw=draw)

    def own_part(self) -> SecondMoment:
        """Return the rows of the examples that this process reads; itself where it reads all."""
        if not isinstance(self.problem, SharedProblem):
            return self
        problem = self.problem.own_part()
        return self if problem is self.problem else evolve(self, problem=problem)

    def apply(self, rows: Rows) -> Rows:
        """Return H g for every row g by one pass; of some blocks alone where H is blockwise."""
        return self._apply(rows, None, self.weight)

    def apply_on(self, rows: Rows, index: Tensor) -> Rows:
        """Return H_S g, the mean over the train examples at the positions S alone."""
        return self._apply(rows, index, 1 / (max(1, len(index)) * self._means))

    @property
    def _means(self) -> int:
        """Return how many readings the mean is taken over: eigenvectors add up, draws do not."""
        return self.draws if self.kind == "fisher" else 1

    def _apply(self, rows: Rows, index: Tensor | None, weight: float) -> Rows:
        space = self.space.select(rows.space.names) if self.blockwise else self.space
        space.require_same(rows.space, "curvature product")
        vectors = rows.to(dtype=self.dtype)
        total: dict[str, Tensor] = {}

        def add(name: str, block: Block, met: Tensor) -> None:
            product = block.combine(met.T)
            total[name] = total[name].add_(product) if name in total else product

        def meet(name: str, block: Block, _: Tensor) -> None:
            if name in space:
                add(name, block, block.inner(vectors.blocks[name]))

        if self.blockwise:
            for draw in range(self.draws):
                self.problem.stream(meet, kind=self.kind, draw=draw, index=index)
        else:
            for part in self._read(index):
                met = part.inner(vectors)
                for name, block in part.blocks.items():
                    add(name, block, met)
        blocks: dict[str, Block] = {}
        for spec in space:
            found = total.get(spec.name)
            if found is None:  # no row at all
                found = torch.zeros(len(rows), *spec.shape, dtype=self.dtype, device=rows.device)
            blocks[spec.name] = DenseBlock(found.mul_(weight).to(rows.dtype))
        return Rows(space, blocks, rows.index, rows.aux)

    def kept(
        self, name: str, part: Any, make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return what a solver computes of this operator, from disk where fits are kept."""
        rows = {"rows": self.kind, "draws": self.draws, "blockwise": self.blockwise}
        return kept(self.problem, name, {**rows, "solver": part}, make)

    def dense(self) -> Tensor:
        """Return H in float64, ``[d, d]``.

        Raises:
            MemoryBudgetError: It does not fit the memory that may be used.
        """
        size, device = self.space.dim, self.problem.device
        require_room(self.space, 8 * size**2, f"a {size} x {size} matrix", self.memory)
        if self.blockwise:
            matrix = torch.zeros(size, size, dtype=torch.float64, device=device)
            for name, moment in squares(self.space, [(self, 1.0)]).items():
                start = self.space.offsets[name]
                where = slice(start, start + len(moment))
                matrix[where, where] = moment
            return matrix

        def read(problem: Problem) -> dict[str, Tensor]:
            total = torch.zeros(size, size, dtype=torch.float64, device=device)
            for part in evolve(self, problem=problem).rows():
                flat = part.flat().double()
                total.addmm_(flat.T, flat, alpha=self.weight)
            return {"H": total}

        return summed(self.problem, read)["H"]

    # --- eigenvectors, where blocks are small ---------------------------------------------------
    @property
    def basis(self) -> BlockBasis:
        """Return the eigenvectors of every block."""
        return self._spectrum[0]

    @property
    def eigenvalues(self) -> Mapping[str, Tensor]:
        """Return the eigenvalues of every block, in float64."""
        return self._spectrum[1]

    @property
    def complete(self) -> bool:
        """Return whether the eigenvectors span every block: not where there are few rows."""
        return spans(self.space, count_rows([self]))

    @cached_property
    def _spectrum(self) -> tuple[BlockBasis, dict[str, Tensor]]:
        return spectrum_of(self.space, [(self, 1.0)], self.memory)


def answers(space: Space, *, blockwise: bool) -> frozenset[str]:
    """Return what a `SecondMoment` answers on a space: eigenvectors too where blocks are small."""
    apart = blockwise or len(space) == 1
    small = apart and all(spec.size <= LARGEST_SPECTRUM for spec in space)
    return frozenset({"apply", "dense", "rows", "sampled"}) | ({"spectral"} if small else set())


def outlook(space: Space, asked: frozenset[str], *, blockwise: bool) -> Outlook:
    """Return what the inverse of a `SecondMoment` will be, from what its solver asks for."""
    if "spectral" not in asked:
        return Outlook(blockwise=blockwise)
    return Outlook(blockwise=True, splits=all(spec.kind == "dense" for spec in space))


def foreseen(operator: Any, asked: frozenset[str], *, blockwise: bool) -> Outlook:
    """Return the same of an operator whose number of rows is known, before any is read."""
    told = outlook(operator.space, asked, blockwise=blockwise)
    return evolve(told, splits=told.splits and operator.complete)
