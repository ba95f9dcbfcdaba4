"""Principal directions of a layer's inputs and output gradients over the train set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import define, field
from torch import Tensor

from dattri_core import (
    Block,
    MemoryBudgetError,
    NumericsError,
    Problem,
    SpecError,
    factor_entries,
    factor_sums,
    format_bytes,
)

Place = tuple[str, str]
"""Name of a block, and ``"outputs"`` or ``"inputs"``."""
COPIES = 3
"""Of a moment that are alive at once: the sum, its eigenvectors, and the part of a batch."""


def principal_directions(problem: Problem, ranks: Mapping[Place, int]) -> dict[Place, Tensor]:
    """Return the eigenvectors of the largest eigenvalues of second moments, as rows ``[r, size]``.

    The moment of a side is sum e e^T or sum x x^T over all positions of all train rows whose
    gradient e is not zero, added up in float64. For rows that have no factors it is sum G G^T or
    sum G^T G. A direction in which no train row has anything, to rounding, is a row of zeros: any
    other choice would be arbitrary. Eigenvectors have their largest entry positive.

    Args:
        problem: The train set; one pass over it, or several where the moments do not fit at once.
        ranks: r for each side that is wanted.

    Raises:
        MemoryBudgetError: The moments of one block do not fit the problem's memory.
        NumericsError: A moment is not finite.
        SpecError: A block whose space promises factors came formed.
    """
    found: dict[Place, Tensor] = {}
    names = {name for name, _ in ranks}
    while names:
        moments = Moments(problem, frozenset(names))
        problem.stream(moments.add, kind="loss")
        for place, rank in ranks.items():
            if place[0] in moments.totals:
                found[place] = moments.leading(place, rank)
        names = moments.postponed
    return found


@define(eq=False)
class Moments:
    """Second moments of the named blocks, as many of them as half of the problem's memory holds."""

    problem: Problem
    names: frozenset[str]
    totals: dict[str, dict[str, Tensor]] = field(factory=dict)
    postponed: set[str] = field(factory=set)
    _held: int = 0

    def add(self, name: str, block: Block, index: Tensor) -> None:
        """Add the rows of one block of one batch."""
        if name not in self.names or name in self.postponed:
            return
        factored = self.problem.space[name].kind == "outer"
        if name not in self.totals and not self._reserve(name, block, factored):
            return
        wide = block.to(None, torch.float64)
        sums = _of_factors(wide) if factored else _of_matrices(wide, self.problem, name)
        held = self.totals.setdefault(name, {})
        for side, values in sums.items():
            if side not in held:
                held[side] = values
                continue
            if held[side].shape != values.shape:
                raise SpecError(
                    f"projector 'kronecker': block {name!r} has one-hot inputs in some batches "
                    "and others elsewhere; give initialisation='random', or leave the layer out "
                    "(parameters=...)"
                )
            held[side] += values

    def leading(self, place: Place, rank: int) -> Tensor:
        """Return the first principal directions of one side, and forget its moment."""
        name, side = place
        total = self.totals[name].pop(side)
        if not bool(torch.isfinite(total).all()):
            raise NumericsError(
                f"projector 'kronecker': the second moment of the {side} of block {name!r} is not "
                "finite; look for a diverged checkpoint, or for squares that overflow: try "
                "model.double()"
            )
        if total.dim() == 1:
            return _largest(total, rank)
        return _eigenvectors(total, rank, self.problem.dtype)

    def _reserve(self, name: str, block: Block, factored: bool) -> bool:
        outputs, inputs = self.problem.space[name].matrix_shape
        entries = factor_entries(block) if factored else outputs**2 + inputs**2
        needed, budget = COPIES * 8 * entries, self.problem.memory // 2
        if needed > budget:
            raise MemoryBudgetError(
                f"projector 'kronecker': the principal directions of block {name!r} of shape "
                f"{(outputs, inputs)} need second moments of {format_bytes(needed)}, and "
                f"{format_bytes(budget)} may be used; give a larger memory=, "
                "initialisation='random', or leave the layer out (parameters=...)"
            )
        if self._held + needed > budget:
            self.postponed.add(name)
            return False
        self._held += needed
        return True


def _of_factors(block: Block) -> dict[str, Tensor]:
    sums = factor_sums(block)
    return {"outputs": sums.outputs, "inputs": sums.inputs}


def _of_matrices(block: Block, problem: Problem, name: str) -> dict[str, Tensor]:
    matrices = block.flat().reshape(len(block), *problem.space[name].matrix_shape)
    rows = matrices.transpose(0, 1).flatten(1)  # [O, B I]
    columns = matrices.flatten(0, 1)  # [B O, I]
    return {"outputs": rows @ rows.mT, "inputs": columns.mT @ columns}


def _eigenvectors(moment: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    chosen = vectors[:, -rank:].flip(1).mT
    # Numbers are known to the rounding of the rows, so squares of them to its square.
    precision = max(torch.finfo(dtype).eps ** 2, torch.finfo(torch.float64).eps)
    empty = values[-rank:].flip(0) <= len(values) * precision * values[-1].clamp_min(0)
    heaviest = chosen.gather(1, chosen.abs().argmax(1, keepdim=True))
    directions: Tensor = (chosen * heaviest.sign()).masked_fill(empty.unsqueeze(1), 0.0)
    return directions


def _largest(diagonal: Tensor, rank: int) -> Tensor:
    """Return unit vectors at the largest entries, ``[r, size]``; of equal ones the first."""
    order = diagonal.argsort(descending=True, stable=True)[:rank]
    chosen = diagonal.new_zeros(rank, len(diagonal))
    chosen[torch.arange(rank, device=order.device), order] = (diagonal[order] > 0).double()
    return chosen
