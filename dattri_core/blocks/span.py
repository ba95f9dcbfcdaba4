"""Rows that are combinations of other rows, and rows that are sums: neither is formed."""

from __future__ import annotations

import math

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core.blocks.block import (
    Block,
    LinearFunction,
    column,
    explain_inner,
    item_of,
    require_alike,
)
from dattri_core.blocks.dense import DenseBlock
from dattri_core.blocks.finite import all_finite
from dattri_core.blocks.inputs import accumulate
from dattri_core.contract import Order, Shape, limit_now, plan_pair
from dattri_core.errors import SpecError


@frozen(eq=False)
class SpanBlock:
    """C rows in the span of m others: row c is ``sum_k coefficients[c,k] base_k``.

    The base is held once, however many blocks lie in its span, and never copied. Products go
    through it, ``inner(g) = coefficients base.inner(g)``, unless forming the rows is cheaper.
    """

    coefficients: Tensor  # [C, m]
    base: Block  # m rows

    def __attrs_post_init__(self) -> None:
        if self.coefficients.dim() != 2 or self.coefficients.shape[1] != len(self.base):
            raise SpecError(
                f"span block: coefficients {tuple(self.coefficients.shape)} must be [C, m] with "
                f"one column for each of the {len(self.base)} rows of the base"
            )

    def __len__(self) -> int:
        return int(self.coefficients.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one row."""
        return self.base.shape

    @property
    def positions(self) -> int | None:
        """Return the number of products that a row is the sum of."""
        return len(self.base) * (self.base.positions or 1)

    @property
    def planned(self) -> Shape:
        """Return what the contraction planner needs to know."""
        base = self.base.planned
        return Shape(len(self), self.positions, base.outputs, base.inputs, base=base)

    @property
    def device(self) -> torch.device:
        """Return where the numbers live."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the base."""
        return self.base.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes held, without the base, which others hold too."""
        return self.coefficients.numel() * self.coefficients.element_size()

    def dense(self) -> DenseBlock:
        """Form the rows."""
        return DenseBlock(self.base.combine(self.coefficients))

    def flat(self) -> Tensor:
        """Return the formed rows flat, ``[C, d]``."""
        return self.dense().flat()

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return ``sum_c coefficients[b, c] row_c``, formed: ``[B, *shape]``."""
        own = accumulate(self.coefficients)
        return self.base.combine(coefficients.to(own) @ own)

    def inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return all inner products ``[C, B]`` with the rows of ``other``."""
        if isinstance(other, SumBlock):
            return other.inner(self, order=order, limit=limit).T
        limit = limit_now() if limit is None else limit
        require_alike(self, other, "inner")
        if explain_inner(self, other, order).order == "form":
            return self._inner_formed(other, order, limit)
        step = max(1, limit // max(1, 2 * item_of(self) * len(other)))
        total: Tensor | None = None
        for start in range(0, max(1, len(self.base)), step):
            part = slice(start, start + step)
            met = self.base.take(part).inner(other, limit=limit)
            product = self.coefficients[:, part].to(met) @ met
            total = product if total is None else total.add_(product)
        assert total is not None
        return total

    def pair_inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return the inner product of each row with the same row of ``other``, ``[C]``."""
        if isinstance(other, SumBlock):
            return other.pair_inner(self, order=order, limit=limit)
        limit = limit_now() if limit is None else limit
        require_alike(self, other, "pairwise inner", paired=True)
        if plan_pair(self.planned, other.planned, order=order).order == "form":
            return self.dense().pair_inner(other.dense(), limit=limit)
        total = accumulate(self.coefficients.new_zeros(len(self))).to(self.device)
        step = max(1, limit // max(1, 2 * item_of(self) * len(self)))
        for start in range(0, len(self.base), step):
            part = slice(start, start + step)
            met = self.base.take(part).inner(other, limit=limit)  # [m, C]
            product = (self.coefficients[:, part].to(met) * met.T).sum(1)
            total = product if start == 0 else total.add_(product)
        return total

    def map(self, on_inputs: LinearFunction | None, on_outputs: LinearFunction | None) -> SpanBlock:
        """Apply linear functions of the last axis to the inputs and outputs of the base."""
        return evolve(self, base=self.base.map(on_inputs, on_outputs))

    def scale(self, weights: Tensor) -> SpanBlock:
        """Multiply row c by ``weights[c]``."""
        return evolve(self, coefficients=self.coefficients * column(weights, self.coefficients))

    def take(self, index: Tensor | slice) -> SpanBlock:
        """Return the chosen rows, in the span of the same base."""
        return evolve(self, coefficients=self.coefficients[index])

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> SpanBlock:
        """Return the rows on another device or in another dtype."""
        coefficients = self.coefficients.to(device=device, dtype=dtype)
        base = self.base.to(device, dtype)
        same = coefficients is self.coefficients and base is self.base
        return self if same else SpanBlock(coefficients, base)

    def is_finite(self) -> bool:
        """Return whether every number is finite."""
        return all_finite(self.coefficients) and self.base.is_finite()

    def _inner_formed(self, other: Block, order: Order | None, limit: int) -> Tensor:
        step = max(1, limit // max(1, 2 * item_of(self) * math.prod(self.shape)))
        parts = [
            self.take(slice(start, start + step)).dense().inner(other, order=order, limit=limit)
            for start in range(0, max(1, len(self)), step)
        ]
        return torch.cat(parts) if len(parts) != 1 else parts[0]


@frozen(eq=False)
class SumBlock:
    """B rows that are sums: row b is the sum over parts of their rows b."""

    parts: tuple[Block, ...]

    def __attrs_post_init__(self) -> None:
        kinds = {(len(part), part.shape) for part in self.parts}
        if len(kinds) != 1:
            raise SpecError(
                f"sum block: parts of (rows, shape) {sorted(map(str, kinds))} cannot be added; "
                "each must hold the same number of rows of one shape"
            )

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one row."""
        return self.parts[0].shape

    @property
    def positions(self) -> int | None:
        """Return the number of products that a row is the sum of."""
        return sum(part.positions or 1 for part in self.parts)

    @property
    def planned(self) -> Shape:
        """Return what the contraction planner needs to know."""
        parts = tuple(part.planned for part in self.parts)
        first = parts[0]
        return Shape(len(self), self.positions, first.outputs, first.inputs, parts=parts)

    @property
    def device(self) -> torch.device:
        """Return where the numbers live."""
        return self.parts[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the numbers."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes held."""
        return sum(part.nbytes for part in self.parts)

    def dense(self) -> DenseBlock:
        """Form the rows."""
        total = self.parts[0].dense().values
        for part in self.parts[1:]:
            total = total + part.dense().values
        return DenseBlock(total)

    def flat(self) -> Tensor:
        """Return the formed rows flat, ``[B, d]``."""
        return self.dense().flat()

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return ``sum_b coefficients[c, b] row_b``, formed: ``[C, *shape]``."""
        return _added([part.combine(coefficients) for part in self.parts])

    def inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return all inner products ``[B, C]`` with the rows of ``other``."""
        require_alike(self, other, "inner")
        if explain_inner(self, other, order).order == "form":
            return self.dense().inner(other, order=order, limit=limit)
        return _added([part.inner(other, limit=limit) for part in self.parts])

    def pair_inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return the inner product of each row with the same row of ``other``, ``[B]``."""
        require_alike(self, other, "pairwise inner", paired=True)
        if plan_pair(self.planned, other.planned, order=order).order == "form":
            return self.dense().pair_inner(other, order=order, limit=limit)
        return _added([part.pair_inner(other, limit=limit) for part in self.parts])

    def map(self, on_inputs: LinearFunction | None, on_outputs: LinearFunction | None) -> SumBlock:
        """Apply linear functions of the last axis to the inputs and outputs of every part."""
        return SumBlock(tuple(part.map(on_inputs, on_outputs) for part in self.parts))

    def scale(self, weights: Tensor) -> SumBlock:
        """Multiply row b by ``weights[b]``."""
        return SumBlock(tuple(part.scale(weights) for part in self.parts))

    def take(self, index: Tensor | slice) -> SumBlock:
        """Return the chosen rows."""
        return SumBlock(tuple(part.take(index) for part in self.parts))

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> SumBlock:
        """Return the rows on another device or in another dtype."""
        return SumBlock(tuple(part.to(device, dtype) for part in self.parts))

    def is_finite(self) -> bool:
        """Return whether every number is finite."""
        return all(part.is_finite() for part in self.parts)


def _added(values: list[Tensor]) -> Tensor:
    """Return the sum, added into the first: each was made here and belongs to nobody else."""
    total = values[0]
    for value in values[1:]:
        total = total.add_(value)
    return total
