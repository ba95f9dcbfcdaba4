"""Eigenvectors of the diagonal blocks of a second moment, on the smaller side of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from typing_extensions import Protocol

from dattri_core import (
    Block,
    MemoryBudgetError,
    Problem,
    RowKind,
    Space,
    format_bytes,
    summed,
)
from dattri_parts.curvatures.eigenbasis import BlockBasis
from dattri_parts.curvatures.live import eigenpairs

FEW = 4
"""A block of at least so many times more numbers than rows is decomposed by its rows."""


class Moment(Protocol):
    """H = weight sum_i r_i r_i^T, the rows read ``draws`` times."""

    @property
    def problem(self) -> Problem:
        """Return where the rows are read."""
        ...

    @property
    def kind(self) -> RowKind:
        """Return which rows."""
        ...

    @property
    def draws(self) -> int:
        """Return how often they are read."""
        ...

    @property
    def weight(self) -> float:
        """Return the weight of each outer product."""
        ...


def count_rows(moments: Sequence[Moment]) -> int:
    """Return how many rows second moments are made of."""
    return sum(moment.problem.n_train * moment.draws for moment in moments)


def spans(space: Space, rows: int) -> bool:
    """Return whether so many rows give eigenvectors that span every block."""
    return all(not _few(rows, spec.size) for spec in space)


def spectrum_of(
    space: Space, moments: Sequence[tuple[Moment, float]], memory: int
) -> tuple[BlockBasis, dict[str, Tensor]]:
    """Return eigenvectors and eigenvalues of the diagonal blocks of a sum of second moments.

    Of a block of many more numbers than there are rows, only those in the span of the rows: the
    right singular vectors of ``sqrt(weight) r_i``. The others have the eigenvalue 0, see `spans`.

    Args:
        space: Of the rows.
        moments: With the weight of each in the sum.
        memory: Bytes that may be used.

    Raises:
        MemoryBudgetError: They do not fit the memory; before any row is read.
    """
    rows = count_rows([moment for moment, _ in moments])
    needed = 16 * sum(spec.size * _kept(rows, spec.size) for spec in space)
    require_room(space, needed, "the eigenvectors of its blocks", memory)
    held: dict[str, list[Tensor]] = {s.name: [] for s in space if _few(rows, s.size)}
    columns, values = {}, {}
    total = squares(space.select([n for n in space.names if n not in held]), moments, held)
    for spec in space:
        if spec.name in held:
            _, found, turned = torch.linalg.svd(torch.cat(held.pop(spec.name)), full_matrices=False)
            columns[spec.name], values[spec.name] = turned.mT, found.square()
        else:
            found, columns[spec.name] = eigenpairs(total.pop(spec.name))
            values[spec.name] = found.clamp_min(0)  # a second moment: below zero is rounding
    return BlockBasis(space, columns), values


def squares(
    space: Space,
    moments: Sequence[tuple[Moment, float]],
    held: Mapping[str, list[Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the diagonal blocks of a sum of second moments in float64.

    Args:
        space: The blocks.
        moments: With the weight of each in the sum.
        held: Takes the rows of other blocks, times the root of their weight, in the same pass.
    """
    total: dict[str, Tensor] = {}
    for moment, share in moments:
        read = partial(_sums, space, moment, share * moment.weight, held or {})
        # Rows that are held are no sums: every process reads all of them.
        sums = read(moment.problem) if held else summed(moment.problem, read)
        for name, matrix in sums.items():
            total[name] = total[name].add_(matrix) if name in total else matrix
    return total


def _sums(
    space: Space,
    moment: Moment,
    weight: float,
    held: Mapping[str, list[Tensor]],
    problem: Problem,
) -> dict[str, Tensor]:
    """Return the diagonal blocks of one second moment over the examples of a problem."""
    device = problem.device
    total = {
        spec.name: torch.zeros(spec.size, spec.size, dtype=torch.float64, device=device)
        for spec in space
    }

    def add(name: str, block: Block, _: Tensor) -> None:
        flat = block.flat().double()
        if name in total:
            total[name].addmm_(flat.mT, flat, alpha=weight)
        elif name in held:
            held[name].append(flat.mul(weight**0.5))

    for draw in range(moment.draws):
        problem.stream(add, kind=moment.kind, draw=draw)
    return total


def require_room(space: Space, needed: int, what: str, memory: int) -> None:
    """Raise `MemoryBudgetError` when a part of a second moment needs more than the memory."""
    if needed > memory:
        raise MemoryBudgetError(
            f"second moment of rows of {space.dim} numbers: {what} needs {format_bytes(needed)}, "
            f"{format_bytes(memory)} may be used; use a solver that needs rows alone "
            "('woodbury'), or a projector"
        )


def _few(rows: int, size: int) -> bool:
    return 0 < rows * FEW <= size


def _kept(rows: int, size: int) -> int:
    """Return how many eigenvectors of a block are kept."""
    return rows if _few(rows, size) else size
