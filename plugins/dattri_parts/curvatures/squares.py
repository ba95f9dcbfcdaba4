"""Sums of squared entries over the train set, in the coordinates of given eigenvectors."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import define, field
from torch import Tensor

from dattri_core import Block, square_sum
from dattri_parts.curvatures.spectrum import Kronecker

NO_SIDES: Mapping[str, Kronecker] = {}


@define(eq=False)
class Squares:
    """Adds up ``(Q^T g)^2`` of some blocks, entry by entry.

    Args:
        names: The blocks; others are passed over.
        sides: Q by block; blocks that are left out keep their own coordinates.
    """

    names: frozenset[str]
    sides: Mapping[str, Kronecker] = NO_SIDES
    totals: dict[str, Tensor] = field(factory=dict)

    def add(self, name: str, block: Block) -> None:
        """Add the rows of one block of one batch."""
        if name not in self.names:
            return
        sides = self.sides.get(name)
        if sides is None:
            squares = square_sum(block)
        elif sides.grouped:
            squares = square_sum(sides.turn(block))
        else:
            squares = square_sum(block, sides.on_inputs, sides.on_outputs)
        self.totals[name] = self.totals[name].add_(squares) if name in self.totals else squares

    def times(self, weight: float) -> dict[str, Tensor]:
        """Return the sums times a weight."""
        return {name: total.mul_(weight) for name, total in self.totals.items()}
