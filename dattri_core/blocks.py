"""Blocks: the kinds of block that rows are made of; only this module knows them.

Axes: B and C rows, T and S positions, O and I a layer's outputs and inputs, d flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core.contract import (
    Order,
    Plan,
    Shape,
    limit_now,
    plan_inner,
    plan_pair,
    rows_per_slice,
)
from dattri_core.errors import SpecError

LinearFunction: TypeAlias = Callable[[Tensor], Tensor] | Tensor
"""Of the last axis: a function, or a matrix ``[k, I]``."""


def accumulate(values: Tensor) -> Tensor:
    """Return values in float32 when they are half precision: sums never run in fewer bits."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


@frozen(eq=False)
class OneHot:
    """Inputs of an embedding: indices ``[B, T]`` that stand for one-hot vectors of length I."""

    index: Tensor
    size: int

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the one-hot vectors ``[B, T, I]``."""
        return torch.nn.functional.one_hot(self.index, self.size).to(dtype)


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

    def inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return all inner products ``[B, C]`` with the rows of ``other``."""
        return _inner(self, other, order, limit)

    def pair_inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return the inner product of each row with the same row of ``other``, ``[B]``."""
        return _pair_inner(self, other, order, limit)

    def map(
        self, on_inputs: LinearFunction | None, on_outputs: LinearFunction | None
    ) -> DenseBlock:
        """Apply linear functions of the last axis to inputs and outputs; None leaves a side."""
        if self.values.dim() != 3:
            raise SpecError(
                f"map on factors: rows of shape {self.shape} have no outputs and inputs; "
                "only blocks of shape (O, I) do"
            )
        values = _apply(on_inputs, self.values)
        return DenseBlock(_apply(on_outputs, values.mT).mT)

    def scale(self, weights: Tensor) -> DenseBlock:
        """Multiply row b by ``weights[b]``."""
        return DenseBlock(self.values * _column(weights.to(self.values.dtype), self.values))

    def take(self, index: Tensor | slice) -> DenseBlock:
        """Return the chosen rows."""
        return DenseBlock(self.values[index])

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> DenseBlock:
        """Return the rows on another device or in another dtype."""
        return DenseBlock(self.values.to(device=device, dtype=dtype))

    def is_finite(self) -> bool:
        """Return whether every number is finite."""
        return bool(torch.isfinite(self.values).all())


@frozen(eq=False)
class OuterBlock:
    """B rows as factors: row b is ``sum_t outputs[b,t] (x) inputs[b,t]``, shape ``(O, I)``.

    A row of low rank r (left ``[B,O,r]`` times right ``[B,r,I]``) is the same with r positions;
    see `low_rank`.
    """

    outputs: Tensor  # [B, T, O]
    inputs: Tensor | OneHot  # [B, T, I]

    def __attrs_post_init__(self) -> None:
        inputs = self.inputs.index if isinstance(self.inputs, OneHot) else self.inputs
        if self.outputs.dim() != 3 or self.outputs.shape[:2] != inputs.shape[:2]:
            raise SpecError(
                f"outer block: outputs {tuple(self.outputs.shape)} and inputs "
                f"{tuple(inputs.shape)} must be [B, T, O] and [B, T, I] with equal B and T"
            )

    def __len__(self) -> int:
        return int(self.outputs.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape (O, I) of one row."""
        size = self.inputs.size if isinstance(self.inputs, OneHot) else self.inputs.shape[2]
        return (int(self.outputs.shape[2]), int(size))

    @property
    def positions(self) -> int | None:
        """Return the number of outer products T of a row."""
        return int(self.outputs.shape[1])

    @property
    def device(self) -> torch.device:
        """Return where the numbers live."""
        return self.outputs.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the numbers."""
        return self.outputs.dtype

    @property
    def nbytes(self) -> int:
        """Return the bytes held."""
        held = self.inputs.index if isinstance(self.inputs, OneHot) else self.inputs
        return sum(t.numel() * t.element_size() for t in (self.outputs, held))

    def dense(self) -> DenseBlock:
        """Form the rows, ``[B, O, I]``."""
        if not isinstance(self.inputs, OneHot):
            # bto,bti->boi as one batched product
            return DenseBlock(accumulate(self.outputs).mT @ accumulate(self.inputs))
        rows, _, outs = self.outputs.shape
        values = accumulate(self.outputs)
        formed = values.new_zeros(rows, self.inputs.size, outs)
        index = self.inputs.index.unsqueeze(-1).expand(-1, -1, outs)
        return DenseBlock(formed.scatter_add_(1, index, values).mT)

    def flat(self) -> Tensor:
        """Return the formed rows flat, ``[B, d]``."""
        return self.dense().flat()

    def inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return all inner products ``[B, C]`` with the rows of ``other``."""
        return _inner(self, other, order, limit)

    def pair_inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return the inner product of each row with the same row of ``other``, ``[B]``."""
        return _pair_inner(self, other, order, limit)

    def map(
        self, on_inputs: LinearFunction | None, on_outputs: LinearFunction | None
    ) -> OuterBlock:
        """Apply linear functions of the last axis to the factors, None leaves one as it is.

        The row stays factored. A matrix for the inputs of an embedding is read by columns: no
        one-hot vector is made.
        """
        return OuterBlock(_apply(on_outputs, self.outputs), self._mapped_inputs(on_inputs))

    def _mapped_inputs(self, function: LinearFunction | None) -> Tensor | OneHot:
        inputs = self.inputs
        if function is None or not isinstance(inputs, OneHot):
            return inputs if isinstance(inputs, OneHot) else _apply(function, inputs)
        if isinstance(function, Tensor):
            return function.mT[inputs.index]
        return function(inputs.dense(self.outputs.dtype))

    def scale(self, weights: Tensor) -> OuterBlock:
        """Multiply row b by ``weights[b]``."""
        weights = weights.to(self.outputs.dtype)
        return evolve(self, outputs=self.outputs * _column(weights, self.outputs))

    def take(self, index: Tensor | slice) -> OuterBlock:
        """Return the chosen rows."""
        if isinstance(self.inputs, OneHot):
            return OuterBlock(
                self.outputs[index], evolve(self.inputs, index=self.inputs.index[index])
            )
        return OuterBlock(self.outputs[index], self.inputs[index])

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> OuterBlock:
        """Return the rows on another device or in another dtype."""
        outputs = self.outputs.to(device=device, dtype=dtype)
        if isinstance(self.inputs, OneHot):
            return OuterBlock(outputs, evolve(self.inputs, index=self.inputs.index.to(device)))
        return OuterBlock(outputs, self.inputs.to(device=device, dtype=dtype))

    def is_finite(self) -> bool:
        """Return whether every number is finite."""
        held = self.outputs if isinstance(self.inputs, OneHot) else self.inputs
        return bool(torch.isfinite(self.outputs).all() and torch.isfinite(held).all())


Block: TypeAlias = DenseBlock | OuterBlock


def low_rank(left: Tensor, right: Tensor) -> OuterBlock:
    """Return rows of low rank, ``left [B,O,r]`` times ``right [B,r,I]``, kept as factors."""
    return OuterBlock(left.mT, right)


def shape_of(block: Block) -> Shape:
    """Return what the contraction planner needs to know of a block."""
    shape = block.shape
    outputs = shape[0] if shape else 1
    one_hot = isinstance(block, OuterBlock) and isinstance(block.inputs, OneHot)
    return Shape(len(block), block.positions, outputs, math.prod(shape[1:]), one_hot)


def explain_inner(left: Block, right: Block, order: Order | None = None) -> Plan:
    """Return the plan that `inner` follows for these two blocks."""
    return plan_inner(shape_of(left), shape_of(right), order=order, item=_item(left))


def concatenate(blocks: Sequence[Block]) -> Block:
    """Join rows of several blocks of one shape; factors stay factors, positions are zero-padded."""
    if len(blocks) == 1:
        return blocks[0]
    outer = [block for block in blocks if isinstance(block, OuterBlock)]
    if len(outer) < len(blocks):
        return DenseBlock(torch.cat([block.dense().values for block in blocks]))
    longest = max(block.outputs.shape[1] for block in outer)
    outputs = torch.cat([_pad(block.outputs, longest) for block in outer])
    indices = [b.inputs for b in outer if isinstance(b.inputs, OneHot)]
    if len(indices) == len(outer):
        index = torch.cat([_pad(one_hot.index, longest) for one_hot in indices])
        return OuterBlock(outputs, OneHot(index, indices[0].size))
    inputs = [
        b.inputs.dense(b.outputs.dtype) if isinstance(b.inputs, OneHot) else b.inputs for b in outer
    ]
    return OuterBlock(outputs, torch.cat([_pad(x, longest) for x in inputs]))


def _apply(function: LinearFunction | None, vectors: Tensor) -> Tensor:
    if function is None:
        return vectors
    if isinstance(function, Tensor):
        return accumulate(vectors) @ function.mT
    return function(vectors)


def _column(weights: Tensor, values: Tensor) -> Tensor:
    return weights.to(values.device).reshape(-1, *([1] * (values.dim() - 1)))


def _pad(values: Tensor, positions: int) -> Tensor:
    missing = positions - values.shape[1]
    if missing == 0:
        return values
    return torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], dim=1)


def _item(block: Block) -> int:
    values = block.outputs if isinstance(block, OuterBlock) else block.values
    return max(4, values.element_size())


def _require_pair(left: Block, right: Block, operation: str) -> None:
    if left.shape != right.shape:
        raise SpecError(f"{operation}: rows of shape {left.shape} meet rows of {right.shape}")


def _inner(left: Block, right: Block, order: Order | None, limit: int | None) -> Tensor:
    limit = limit_now() if limit is None else limit
    _require_pair(left, right, "inner")
    plan = explain_inner(left, right, order)
    if isinstance(left, DenseBlock) and isinstance(right, DenseBlock):
        return accumulate(left.flat()) @ accumulate(right.flat()).T
    if plan.order == "form":
        return _inner_formed(left, right, limit)
    if plan.order == "gather" and isinstance(right, OuterBlock):
        return _inner(right, left, order, limit).T  # the indexed side leads
    step = rows_per_slice(plan, len(left), limit)
    contract = _inner_gather if plan.order == "gather" else _inner_ghost
    starts = range(0, max(1, len(left)), step)  # one empty slice when there are no rows
    slices = [left.take(slice(start, start + step)) for start in starts]
    parts = [contract(part, right) for part in slices]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _inner_formed(left: Block, right: Block, limit: int) -> Tensor:
    if (
        isinstance(left, OuterBlock)
        and isinstance(left.inputs, Tensor)
        and left.positions == 1
        and isinstance(right, DenseBlock)
    ):
        return _inner_one_position(left.outputs[:, 0], left.inputs[:, 0], right.values, limit)
    size = max(1, math.prod(left.shape))
    step = max(1, limit // (2 * size * _item(left)))
    columns = []
    for start in range(0, len(right), step):
        formed = accumulate(right.take(slice(start, start + step)).flat())  # [c, d]
        rows = [
            accumulate(left.take(slice(first, first + step)).flat()) @ formed.T
            for first in range(0, len(left), step)
        ]
        columns.append(torch.cat(rows) if rows else formed.new_zeros(0, len(formed)))
    if not columns:
        return accumulate(left.flat()).new_zeros(len(left), 0)
    return torch.cat(columns, dim=1) if len(columns) != 1 else columns[0]


def _inner_one_position(outputs: Tensor, inputs: Tensor, formed: Tensor, limit: int) -> Tensor:
    """Return ``<e_b x_b^T, W_c> = e_b . (W_c x_b)``, ``[B, C]``: no row of the left is formed."""
    outputs, inputs, formed = accumulate(outputs), accumulate(inputs), accumulate(formed)
    size = max(1, outputs.shape[1] * outputs.element_size())
    rows = max(1, min(len(outputs), limit // size))
    step = max(1, limit // (size * rows))
    total = outputs.new_empty(len(outputs), len(formed))
    for first in range(0, len(outputs), rows):
        part = slice(first, first + rows)
        for start in range(0, len(formed), step):
            some = formed[start : start + step]  # [c, O, I]
            turned = inputs[part] @ some.flatten(0, 1).T  # [b, c O]
            turned = turned.reshape(len(turned), len(some), -1)
            total[part, start : start + step] = (turned @ outputs[part].unsqueeze(2)).squeeze(2)
    return total


def _inner_ghost(left: Block, right: Block) -> Tensor:
    assert isinstance(left, OuterBlock)
    assert isinstance(right, OuterBlock)
    outer = _gram(left.outputs, right.outputs)  # [B, T, C, S]
    outer *= _input_gram(left.inputs, right.inputs, outer.dtype)
    if outer.shape[1] == outer.shape[3] == 1:  # a sum over one position would copy all of it
        return outer.reshape(len(left), len(right))
    return outer.sum(dim=(1, 3))


def _gram(left: Tensor, right: Tensor) -> Tensor:
    (b, t, _), (c, s, _) = left.shape, right.shape
    product = accumulate(left).flatten(0, 1) @ accumulate(right).flatten(0, 1).T
    return product.reshape(b, t, c, s)


def _input_gram(left: Tensor | OneHot, right: Tensor | OneHot, dtype: torch.dtype) -> Tensor:
    if isinstance(left, OneHot) and isinstance(right, OneHot):
        return (left.index[:, :, None, None] == right.index[None, None]).to(dtype)
    if isinstance(left, OneHot):
        assert isinstance(right, Tensor)
        return accumulate(right)[:, :, left.index].permute(2, 3, 0, 1)  # [C,S,B,T] -> [B,T,C,S]
    if isinstance(right, OneHot):
        return accumulate(left)[:, :, right.index]  # [B, T, C, S]
    return _gram(left, right)


def _inner_gather(left: Block, right: Block) -> Tensor:
    assert isinstance(left, OuterBlock)
    assert isinstance(left.inputs, OneHot)
    assert isinstance(right, DenseBlock)
    columns = accumulate(right.values)[:, :, left.inputs.index]  # [C, O, B, T]
    return torch.einsum("bto,cobt->bc", accumulate(left.outputs), columns)


def _pair_inner(left: Block, right: Block, order: Order | None, limit: int | None) -> Tensor:
    limit = limit_now() if limit is None else limit
    _require_pair(left, right, "pairwise inner")
    if len(left) != len(right):
        raise SpecError(f"pairwise inner: {len(left)} rows meet {len(right)}; counts must be equal")
    sides = [shape_of(left), shape_of(right)]
    factored = isinstance(left, OuterBlock) and isinstance(right, OuterBlock)
    worst = max(sides, key=lambda side: side.positions or 0)
    plan = plan_pair(worst if factored else evolve(worst, positions=None), order=order)
    step = rows_per_slice(plan, len(left), limit)
    if not factored:
        step = max(1, limit // max(1, 2 * _item(left) * sides[0].outputs * sides[0].inputs))
    contract = _pair_ghost if plan.order == "ghost" else _pair_formed
    parts = [
        contract(left.take(slice(start, start + step)), right.take(slice(start, start + step)))
        for start in range(0, len(left), step)
    ]
    return torch.cat(parts) if parts else accumulate(left.flat()).new_zeros(0)


def _pair_formed(left: Block, right: Block) -> Tensor:
    return (accumulate(left.flat()) * accumulate(right.flat())).sum(1)


def _pair_ghost(left: Block, right: Block) -> Tensor:
    assert isinstance(left, OuterBlock)
    assert isinstance(right, OuterBlock)
    outer = accumulate(left.outputs) @ accumulate(right.outputs).mT  # [B, T, S]
    return (outer * _pair_input_gram(left.inputs, right.inputs, outer.dtype)).sum(dim=(1, 2))


def _pair_input_gram(left: Tensor | OneHot, right: Tensor | OneHot, dtype: torch.dtype) -> Tensor:
    if isinstance(left, OneHot) and isinstance(right, OneHot):
        return (left.index[:, :, None] == right.index[:, None, :]).to(dtype)
    if isinstance(left, OneHot):
        assert isinstance(right, Tensor)
        picked = accumulate(right).gather(
            2, left.index[:, None, :].expand(-1, right.shape[1], -1)
        )  # [B, S, T]
        return picked.mT
    if isinstance(right, OneHot):
        return accumulate(left).gather(2, right.index[:, None, :].expand(-1, left.shape[1], -1))
    return accumulate(left) @ accumulate(right).mT
