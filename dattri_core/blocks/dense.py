"""Formed rows."""

from __future__ import annotations

import math

import torch
from attrs import frozen
from torch import Tensor

from dattri_core.blocks.block import (
    Block,
    LinearFunction,
    column,
    doubled,
    explain_inner,
    item_of,
    require_alike,
)
from dattri_core.blocks.finite import all_finite
from dattri_core.blocks.inputs import accumulate, applied, applied_to_outputs, product
from dattri_core.contract import Order, Shape, limit_now, plan_pair, rows_per_slice
from dattri_core.errors import SpecError


@frozen(eq=False)
class DenseBlock:
    """B formed rows: values ``[B, *shape]``."""

    values: Tensor

    def __len__(self) -> int:
        return int(self.values.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one row."""
        return tuple(self.values.shape[1:])

    @property
    def positions(self) -> int | None:
        """Return None: a formed row has no positions."""
        return None

    @property
    def planned(self) -> Shape:
        """Return what the contraction planner needs to know."""
        shape = self.shape
        return Shape(len(self), None, shape[0] if shape else 1, math.prod(shape[1:]))

    @property
    def device(self) -> torch.device:
        """Return where the numbers live."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the numbers."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes held."""
        return self.values.numel() * self.values.element_size()

    def dense(self) -> DenseBlock:
        """Return itself."""
        return self

    def flat(self) -> Tensor:
        """Return the rows flat, ``[B, d]``."""
        return self.values.reshape(len(self), math.prod(self.shape))  # not -1: B may be 0

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return ``sum_b coefficients[c, b] row_b``, formed: ``[C, *shape]``."""
        flat = accumulate(self.flat())
        return (coefficients.to(flat) @ flat).reshape(len(coefficients), *self.shape)

    def inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return all inner products ``[B, C]`` with the rows of ``other``."""
        if not isinstance(other, DenseBlock):
            return other.inner(self, order=order, limit=limit).T
        require_alike(self, other, "inner")
        wide = doubled(self, other)
        if wide is not None:
            return wide[0].inner(wide[1], order=order, limit=limit)
        explain_inner(self, other, order)  # refuses an order that does not exist
        return product(self.flat(), other.flat().T)

    def pair_inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return the inner product of each row with the same row of ``other``, ``[B]``."""
        if not isinstance(other, DenseBlock):
            return other.pair_inner(self, order=order, limit=limit)
        require_alike(self, other, "pairwise inner", paired=True)
        wide = doubled(self, other)
        if wide is not None:
            return wide[0].pair_inner(wide[1], order=order, limit=limit)
        plan = plan_pair(self.planned, order=order, item=item_of(self))
        step = rows_per_slice(plan, len(self), limit_now() if limit is None else limit)
        parts = [
            (accumulate(self.flat()[part]) * accumulate(other.flat()[part])).sum(1)
            for part in (slice(start, start + step) for start in range(0, len(self), step))
        ]
        return torch.cat(parts) if parts else accumulate(self.flat()).new_zeros(0)

    def map(
        self, on_inputs: LinearFunction | None, on_outputs: LinearFunction | None
    ) -> DenseBlock:
        """Apply linear functions of the last axis to inputs and outputs; None leaves a side."""
        if self.values.dim() != 3:
            raise SpecError(
                f"map on factors: rows of shape {self.shape} have no outputs and inputs; "
                "only blocks of shape (O, I) do"
            )
        return DenseBlock(applied_to_outputs(on_outputs, applied(on_inputs, self.values)))

    def scale(self, weights: Tensor) -> DenseBlock:
        """Multiply row b by ``weights[b]``."""
        return DenseBlock(self.values * column(weights, self.values))

    def take(self, index: Tensor | slice) -> DenseBlock:
        """Return the chosen rows."""
        return DenseBlock(self.values[index])

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> DenseBlock:
        """Return the rows on another device or in another dtype."""
        values = self.values.to(device=device, dtype=dtype)
        return self if values is self.values else DenseBlock(values)

    def is_finite(self) -> bool:
        """Return whether every number is finite."""
        return all_finite(self.values)
