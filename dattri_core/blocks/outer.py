"""Rows as factors: sums of outer products of outputs and inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attrs import evolve, frozen
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
from dattri_core.blocks.dense import DenseBlock
from dattri_core.blocks.finite import all_finite
from dattri_core.blocks.inputs import (
    Inputs,
    OneHot,
    Shared,
    accumulate,
    applied,
    counts_of,
    gram,
    held_by,
    input_gram,
    is_one_hot,
    join_inputs,
    map_inputs,
    move_inputs,
    own,
    pad,
    pair_input_gram,
    product,
    take_inputs,
    width_of,
)
from dattri_core.blocks.tiled import inner_in_tiles
from dattri_core.contract import (
    WARM,
    Order,
    Shape,
    forms_to_combine,
    limit_now,
    plan_pair,
    rows_per_slice,
)
from dattri_core.errors import SpecError


@frozen(eq=False)
class OuterBlock:
    """B rows as factors: row b is ``sum_t outputs[b,t] (x) inputs[b,t]``, shape ``(O, I)``.

    A row of low rank r (left ``[B,O,r]`` times right ``[B,r,I]``) is the same with r positions;
    see `low_rank`. Rows that have their inputs in common keep them once: `Shared`, made by
    `share`.
    """

    outputs: Tensor  # [B, T, O]
    inputs: Inputs  # [B, T, I]

    def __attrs_post_init__(self) -> None:
        if self.outputs.dim() != 3 or tuple(self.outputs.shape[:2]) != counts_of(self.inputs):
            raise SpecError(
                f"outer block: outputs {tuple(self.outputs.shape)} and inputs "
                f"{(*counts_of(self.inputs), *held_by(self.inputs).shape[2:])} must be [B, T, O] "
                "and [B, T, I] with equal B and T"
            )

    def __len__(self) -> int:
        return int(self.outputs.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape (O, I) of one row."""
        return (int(self.outputs.shape[2]), width_of(self.inputs))

    @property
    def positions(self) -> int | None:
        """Return the number of outer products T of a row."""
        return int(self.outputs.shape[1])

    @property
    def planned(self) -> Shape:
        """Return what the contraction planner needs to know."""
        shared = isinstance(self.inputs, Shared)
        distinct = len(held_by(self.inputs)) if shared else None
        (outs, size), one_hot = self.shape, is_one_hot(self.inputs)
        return Shape(len(self), self.positions, outs, size, one_hot, distinct)

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
        return sum(t.numel() * t.element_size() for t in (self.outputs, held_by(self.inputs)))

    @property
    def own_inputs(self) -> Tensor | OneHot:
        """Return the inputs of each row apart, ``[B, T, I]``, also where rows share them."""
        return own(self.inputs)

    def dense(self) -> DenseBlock:
        """Form the rows, ``[B, O, I]``."""
        inputs = self.own_inputs
        if isinstance(inputs, Tensor):
            # bto,bti->boi as one batched product
            return DenseBlock(product(self.outputs.mT, inputs))
        rows, _, outs = self.outputs.shape
        values = accumulate(self.outputs)
        formed = values.new_zeros(rows, inputs.size, outs)
        index = inputs.index.unsqueeze(-1).expand(-1, -1, outs)
        return DenseBlock(formed.scatter_add_(1, index, values).mT)

    def flat(self) -> Tensor:
        """Return the formed rows flat, ``[B, d]``."""
        return self.dense().flat()

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return ``sum_b coefficients[c, b] row_b``, formed: ``[C, O, I]``.

        Rows are formed on the way, a few at a time, where that is less work.
        """
        coefficients = coefficients.to(accumulate(self.outputs))
        if len(self) and forms_to_combine(len(coefficients), self.planned):
            return self._combined_formed(coefficients)
        count, per_row = len(coefficients), math.prod(self.outputs.shape[1:]) * item_of(self)
        room = max(1, limit_now() // max(1, 2 * per_row))  # pairs of a row and a coefficient
        rows = min(max(1, len(self)), room)
        total = coefficients.new_empty(count, *self.shape)
        for first in range(0, max(1, len(self)), rows):
            part = self.take(slice(first, first + rows))
            for start in range(0, count, max(1, room // rows)):
                where = slice(start, start + max(1, room // rows))
                formed = part._combined(coefficients[where, first : first + rows])
                if first == 0:
                    total[where] = formed
                else:
                    total[where] += formed
        return total

    def _combined_formed(self, coefficients: Tensor) -> Tensor:
        step = max(1, limit_now() // (2 * max(1, math.prod(self.shape)) * item_of(self)))
        total = coefficients.new_zeros(len(coefficients), math.prod(self.shape))
        for part in (slice(start, start + step) for start in range(0, len(self), step)):
            formed = accumulate(self.take(part).flat())
            torch.addmm(total, coefficients[:, part], formed, out=total)
        return total.reshape(-1, *self.shape)

    def _combined(self, coefficients: Tensor) -> Tensor:
        (outs, size), outputs, inputs = self.shape, accumulate(self.outputs), self.inputs
        weighed = coefficients[:, :, None, None] * outputs  # [C, B, T, O]
        if isinstance(inputs, Shared):  # rows of the same inputs are added first
            kept = weighed.new_zeros(len(coefficients), len(held_by(inputs)), *outputs.shape[1:])
            weighed = kept.index_add_(1, inputs.index.to(weighed.device), weighed)
            inputs = inputs.values
        weighed = weighed.flatten(1, 2)  # [C, B T, O]
        if isinstance(inputs, OneHot):
            formed = weighed.new_zeros(len(coefficients), size, outs)
            return formed.index_add_(1, inputs.index.flatten(), weighed).mT
        flat = weighed.mT.flatten(0, 1) @ accumulate(inputs).flatten(0, 1)
        return flat.reshape(len(coefficients), outs, size)

    def inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return all inner products ``[B, C]`` with the rows of ``other``."""
        if not isinstance(other, (DenseBlock, OuterBlock)):
            return other.inner(self, order=order, limit=limit).T
        limit = limit_now() if limit is None else limit
        require_alike(self, other, "inner")
        wide = doubled(self, other)
        if wide is not None:
            return wide[0].inner(wide[1], order=order, limit=limit)
        plan = explain_inner(self, other, order)
        if plan.order == "form":
            return _inner_formed(self, other, limit)
        if plan.order == "gather" and isinstance(other, OuterBlock):
            return other.inner(self, order=order, limit=limit).T  # the indexed side leads
        step = rows_per_slice(plan, len(self), limit)
        starts = range(0, max(1, len(self)), step)  # one empty slice when there are no rows
        parts = [_slice(self.take(slice(start, start + step)), other) for start in starts]
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def pair_inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return the inner product of each row with the same row of ``other``, ``[B]``."""
        if not isinstance(other, (DenseBlock, OuterBlock)):
            return other.pair_inner(self, order=order, limit=limit)
        limit = limit_now() if limit is None else limit
        require_alike(self, other, "pairwise inner", paired=True)
        wide = doubled(self, other)
        if wide is not None:
            return wide[0].pair_inner(wide[1], order=order, limit=limit)
        plan = plan_pair(self.planned, other.planned, order=order, item=item_of(self))
        step = rows_per_slice(plan, len(self), limit)
        ghost = plan.order == "ghost"
        parts = []
        for start in range(0, len(self), step):
            left, right = (side.take(slice(start, start + step)) for side in (self, other))
            if ghost and isinstance(left, OuterBlock) and isinstance(right, OuterBlock):
                parts.append(_pair_ghost(left, right))
            else:
                parts.append((accumulate(left.flat()) * accumulate(right.flat())).sum(1))
        return torch.cat(parts) if parts else accumulate(self.outputs).new_zeros(0)

    def map(
        self, on_inputs: LinearFunction | None, on_outputs: LinearFunction | None
    ) -> OuterBlock:
        """Apply linear functions of the last axis to the factors, None leaves one as it is.

        The row stays factored. A matrix for the inputs of an embedding is read by columns: no
        one-hot vector is made.
        """
        inputs = map_inputs(self.inputs, on_inputs, self.dtype)
        return OuterBlock(applied(on_outputs, self.outputs), inputs)

    def scale(self, weights: Tensor) -> OuterBlock:
        """Multiply row b by ``weights[b]``."""
        return evolve(self, outputs=self.outputs * column(weights, self.outputs))

    def take(self, index: Tensor | slice) -> OuterBlock:
        """Return the chosen rows."""
        return OuterBlock(self.outputs[index], take_inputs(self.inputs, index))

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> OuterBlock:
        """Return the rows on another device or in another dtype."""
        outputs = self.outputs.to(device=device, dtype=dtype)
        inputs = move_inputs(self.inputs, device, dtype)
        same = outputs is self.outputs and inputs is self.inputs
        return self if same else OuterBlock(outputs, inputs)

    def is_finite(self) -> bool:
        """Return whether every number is finite."""
        held = self.outputs if is_one_hot(self.inputs) else held_by(self.inputs)
        return all_finite(self.outputs) and all_finite(held)


def low_rank(left: Tensor, right: Tensor) -> OuterBlock:
    """Return rows of low rank, ``left [B,O,r]`` times ``right [B,r,I]``, kept as factors."""
    return OuterBlock(left.mT, right)


def join_outer(blocks: Sequence[OuterBlock]) -> OuterBlock:
    """Join rows of several blocks, one after another; shorter ones are padded with zeros."""
    longest = max(block.outputs.shape[1] for block in blocks)
    outputs = torch.cat([pad(block.outputs, longest) for block in blocks])
    parts = [block.inputs for block in blocks]
    return OuterBlock(outputs, join_inputs(parts, longest, outputs.dtype))


# --- inner products -----------------------------------------------------------------------------
def _slice(left: OuterBlock, right: DenseBlock | OuterBlock) -> Tensor:
    if isinstance(right, DenseBlock):
        return _gather(left, right)
    outer = gram(left.outputs, right.outputs)  # [B, T, C, S]
    outer *= input_gram(left.inputs, right.inputs, outer.dtype)
    if outer.shape[1] == outer.shape[3] == 1:  # a sum over one position would copy all of it
        return outer.reshape(len(left), len(right))
    return outer.sum(dim=(1, 3))


def _gather(left: OuterBlock, right: DenseBlock) -> Tensor:
    inputs = left.own_inputs
    assert isinstance(inputs, OneHot)
    columns = accumulate(right.values)[:, :, inputs.index]  # [C, O, B, T]
    return torch.einsum("bto,cobt->bc", accumulate(left.outputs), columns)


def _pair_ghost(left: OuterBlock, right: OuterBlock) -> Tensor:
    outer = product(left.outputs, right.outputs.mT)  # [B, T, S]
    return (outer * pair_input_gram(left.inputs, right.inputs, outer.dtype)).sum(dim=(1, 2))


def _inner_formed(left: OuterBlock, right: DenseBlock | OuterBlock, limit: int) -> Tensor:
    if isinstance(right, DenseBlock) and left.positions == 1 and not is_one_hot(left.inputs):
        # a formed row is less than its inputs met with many
        by_rows = len(right) > left.shape[1]
        return (_left_formed if by_rows else _one_position)(left, right, limit)
    size = max(1, math.prod(left.shape)) * item_of(left)
    # The left is formed once for each slice of the right: few of one size, one that is there.
    there = isinstance(right, DenseBlock) and right.dtype.itemsize >= item_of(right)
    slices = 1 if there else max(1, -(-len(right) // max(1, limit * 3 // (4 * size))))
    width = max(1, -(-len(right) // slices))
    step = max(1, limit // size - (0 if there else width))
    columns = []
    for start in range(0, len(right), width):
        formed = accumulate(right.take(slice(start, start + width)).flat())  # [c, d]
        if not is_one_hot(left.inputs):
            assert not isinstance(left.inputs, OneHot)
            room = limit - (0 if there else len(formed) * size)
            columns.append(inner_in_tiles(left.outputs, left.inputs, formed, room))
            continue
        rows = [
            accumulate(left.take(slice(first, first + step)).flat()) @ formed.T
            for first in range(0, len(left), step)
        ]
        columns.append(torch.cat(rows) if rows else formed.new_zeros(0, len(formed)))
    if not columns:
        return accumulate(left.outputs).new_zeros(len(left), 0)
    return torch.cat(columns, dim=1) if len(columns) != 1 else columns[0]


def _left_formed(left: OuterBlock, right: DenseBlock, limit: int) -> Tensor:
    """Return all inner products; each row of the left is formed once."""
    formed = accumulate(right.flat())
    step = max(1, limit // (2 * max(1, math.prod(left.shape)) * item_of(left)))
    starts = range(0, max(1, len(left)), step)
    parts = [accumulate(left.take(slice(k, k + step)).flat()) @ formed.T for k in starts]
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _one_position(left: OuterBlock, right: DenseBlock, limit: int) -> Tensor:
    """Return ``<e_b x_b^T, W_c> = e_b . (W_c x_b)``, ``[B, C]``: no row of the left is formed."""
    outputs, formed = accumulate(left.outputs[:, 0]), accumulate(right.values)
    size = max(1, outputs.shape[1] * outputs.element_size())
    rows = max(1, min(len(outputs), limit // size))
    step = max(1, min(limit, WARM) // (size * rows))
    total = outputs.new_empty(len(outputs), len(formed))
    for first in range(0, len(outputs), rows):
        part = slice(first, first + rows)
        inputs = take_inputs(left.inputs, part)
        kept = accumulate(held_by(inputs)[:, 0])
        for start in range(0, len(formed), step):
            some = formed[start : start + step]  # [c, O, I]
            turned = kept @ some.flatten(0, 1).T  # [b, c O]
            turned = turned.reshape(len(turned), len(some), -1)
            if isinstance(inputs, Shared):
                turned = turned.index_select(0, inputs.index.to(turned.device))
            total[part, start : start + step] = (turned @ outputs[part].unsqueeze(2)).squeeze(2)
    return total
