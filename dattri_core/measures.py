"""Measures: the numbers of rows about themselves that a scorer may need, added up over blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import Factory, define, evolve, field
from torch import Tensor

from dattri_core.blocks import Block
from dattri_core.contract import limit_now
from dattri_core.protocols import Scorer, Side
from dattri_core.rows import Rows

INVERTED = frozenset({"self-influence", "inverse-norm"})
"""Those for which a train row g passes the stages of the test side too, as B g."""


def needs_inverse(scorer: Scorer) -> bool:
    """Return whether a scorer needs every train row after the stages of the test side."""
    return bool(scorer.needs & INVERTED)


def needs_leverages(scorer: Scorer) -> bool:
    """Return whether all that a scorer needs of those numbers is the self-influence."""
    return scorer.needs & INVERTED == {"self-influence"}


@define(eq=False)
class Measures:
    """Adds up |A g|^2, <A g, B g> and |B g|^2 of rows g, those of them that are needed."""

    needs: frozenset[str]
    _sums: dict[str, Tensor] = field(factory=dict)
    _dtypes: dict[str, torch.dtype] = field(factory=dict)

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
            self._dtypes.setdefault(name, part.dtype)
            if left is right:
                part = without_underflow(part, left)
            self._sums[name] = part if held is None else held + part

    def _root(self, name: str) -> Tensor | None:
        square = self._sums.get(name)
        return None if square is None else root(square).to(self._dtypes[name])


def without_underflow(squares: Tensor, block: Block) -> Tensor:
    """Return squared lengths, in float64 where some are too small for their dtype.

    The square of a length of 1e-24 is zero in float32, and the length is not. Rows of zeros are
    looked at again too, since nothing tells them apart before.

    Args:
        squares: Of the rows, ``[B]``.
        block: The rows.
    """
    if squares.dtype == torch.float64:
        return squares
    limits = torch.finfo(squares.dtype)
    small = squares < limits.tiny / limits.eps
    if not bool(small.any()):
        return squares
    index = small.nonzero()[:, 0]
    step = max(1, limit_now() // max(1, 16 * math.prod(block.shape)))
    found = [block.take(some).flat().double().square().sum(1) for some in torch.split(index, step)]
    return squares.double().index_copy_(0, index, torch.cat(found))


@define(eq=False)
class Known:
    """Numbers of train rows at one checkpoint, so that further query groups need no inverse.

    Args:
        n: Train examples.
    """

    n: int
    _values: dict[tuple[int, str], Tensor] = field(factory=dict)  # [n], by variant and number
    _seen: Tensor = field(
        default=Factory(lambda self: torch.zeros(self.n, dtype=torch.bool), takes_self=True)
    )

    def covers(self, index: Tensor) -> bool:
        """Return whether the rows at these positions were measured, for every variant."""
        return bool(self._seen[index.cpu()].all())

    @property
    def complete(self) -> bool:
        """Return whether all rows were measured."""
        return bool(self._seen.all())

    def foretell(self, found: Mapping[int, Tensor | None]) -> None:
        """Keep the self-influence of all rows, by variant, where inverses know that of each."""
        values = {variant: value for variant, value in found.items() if value is not None}
        if len(values) < len(found):
            return
        self._values |= {(variant, "self_influence"): value for variant, value in values.items()}
        self._seen[:] = True

    def keep(self, sides: Mapping[int, Side]) -> None:
        """Keep what was measured of some rows, by variant."""
        for variant, side in sides.items():
            for name, value in _inverted(side).items():
                held = self._values.setdefault((variant, name), value.new_zeros(self.n))
                held[side.index.to(held.device)] = value
            self._seen[side.index.cpu()] = True

    def added(self, variant: int, side: Side, like: Tensor) -> Side:
        """Return the side of some rows with what was measured of them before, as ``like`` is."""
        found: dict[str, Any] = {
            name: values[side.index.to(values.device)].to(like)
            for (of, name), values in self._values.items()
            if of == variant
        }
        return evolve(side, **found)


def _inverted(side: Side) -> dict[str, Tensor]:
    numbers = {"self_influence": side.self_influence, "inverse_norm": side.inverse_norm}
    return {name: value for name, value in numbers.items() if value is not None}


def root(squares: Tensor) -> Tensor:
    """Return the roots of sums of squares; one that rounding left below zero is zero."""
    return squares.clamp_min(0).sqrt()


def take_side(side: Side, part: slice) -> Side:
    """Return what is known of some of the rows."""

    def optional(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[part]

    return Side(
        side.index[part],
        {key: value[part] for key, value in side.aux.items()},
        optional(side.norm),
        optional(side.self_influence),
        optional(side.inverse_norm),
    )


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
