"""Measures: the numbers of rows about themselves that a scorer may need, added up over blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import define, field
from torch import Tensor

from dattri_core.blocks import Block
from dattri_core.protocols import Scorer, Side
from dattri_core.rows import Rows

INVERTED = frozenset({"self-influence", "inverse-norm"})
"""Those for which a train row g passes the stages of the test side too, as B g."""


def needs_inverse(scorer: Scorer) -> bool:
    """Return whether a scorer needs every train row after the stages of the test side."""
    return bool(scorer.needs & INVERTED)


@define(eq=False)
class Measures:
    """Adds up |A g|^2, <A g, B g> and |B g|^2 of rows g, those of them that are needed."""

    needs: frozenset[str]
    _sums: dict[str, Tensor] = field(factory=dict)

    def add(self, train: Rows, test: Rows | None = None) -> None:
        """Add some blocks of the rows.

        Args:
            train: A g.
            test: B g, where a number of `INVERTED` is needed.
        """
        for name, block in train.blocks.items():
            self._add("norm", block, block)
            if test is not None:
                self._add("self-influence", block, test.blocks[name])
                self._add("inverse-norm", test.blocks[name], test.blocks[name])

    def side(self, index: Tensor, aux: Mapping[str, Tensor]) -> Side:
        """Return what a scorer may read of the rows, all blocks of which were added."""
        own = self._sums.get("self-influence")
        return Side(index, aux, self._root("norm"), own, self._root("inverse-norm"))

    def _add(self, name: str, left: Block, right: Block) -> None:
        if name in self.needs:
            part, held = left.pair_inner(right), self._sums.get(name)
            self._sums[name] = part if held is None else held + part

    def _root(self, name: str) -> Tensor | None:
        square = self._sums.get(name)
        return None if square is None else root(square)


def root(squares: Tensor) -> Tensor:
    """Return the roots of sums of squares; one that rounding left below zero is zero."""
    return squares.clamp_min(0).sqrt()


def join_sides(sides: Sequence[Side]) -> Side:
    """Join the sides of consecutive batches."""

    def optional(values: list[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present) if present else None

    return Side(
        torch.cat([side.index for side in sides]),
        {key: torch.cat([side.aux[key] for side in sides]) for key in sides[0].aux},
        optional([side.norm for side in sides]),
        optional([side.self_influence for side in sides]),
        optional([side.inverse_norm for side in sides]),
    )
