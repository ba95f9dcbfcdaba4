"""Sums over rows of second moments: of their entries, and of their factors.

Axes: B rows, T positions, O and I a layer's outputs and inputs, V tokens of an embedding.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from dattri_core.blocks import (
    Block,
    GroupedBlock,
    LinearFunction,
    OneHot,
    OuterBlock,
    accumulate,
    shape_of,
)
from dattri_core.blocks.inputs import is_one_hot, product
from dattri_core.contract import Order, limit_now, plan_squares, rows_per_slice
from dattri_core.errors import SpecError

LONG_ROW = 2**14
"""Entries from which a processor squares one row at a time faster than all of them."""


# --- entries ------------------------------------------------------------------------------------
def square_sum(
    block: Block,
    on_inputs: LinearFunction | None = None,
    on_outputs: LinearFunction | None = None,
    *,
    order: Order | None = None,
    limit: int | None = None,
) -> Tensor:
    """Return the sum over rows of the square of each entry, of the shape of one row.

    The rows are mapped first, where functions are given, as by `Block.map`; the planner chooses in
    which order, and whether rows are formed at all (`contract.plan_squares`).

    Args:
        block: The rows.
        on_inputs: Linear function of the last axis that keeps its length.
        on_outputs: The same for the outputs.
        order: Force an order.
        limit: Bytes of intermediates; default `contract.limit_now`.
    """
    limit = limit_now() if limit is None else limit
    mapped = on_inputs is not None or on_outputs is not None
    plan = plan_squares(
        shape_of(block),
        on_inputs=on_inputs is not None,
        on_outputs=on_outputs is not None,
        order=order,
        item=max(4, block.dtype.itemsize),
    )
    step = rows_per_slice(plan, len(block), limit)
    total: Tensor | None = None
    for start in range(0, max(1, len(block)), step):  # one empty slice when there are no rows
        part = block.take(slice(start, start + step))
        if plan.order == "form-first":
            part = part.dense()
        if mapped:
            part = part.map(on_inputs, on_outputs)
        squares = _squares(part, plan.order)
        total = squares if total is None else total.add_(squares)
    assert total is not None
    return total


def _squares(block: Block, order: Order) -> Tensor:
    if order in ("ghost", "gather"):
        assert isinstance(block, OuterBlock)
        outputs = accumulate(block.outputs)
        inputs = block.own_inputs
        if isinstance(inputs, OneHot):
            return _one_hot_squares(outputs, inputs.index, inputs.size)
        return _pair_squares(outputs, accumulate(inputs))
    return _formed_squares(accumulate(block.dense().values))


def _formed_squares(values: Tensor) -> Tensor:
    if values.device.type != "cpu":  # a length is read off in one pass, and writes no squares
        lengths: Tensor = torch.linalg.vector_norm(values, dim=0)
        return lengths.square_()
    if values[:1].numel() < LONG_ROW:
        return values.square().sum(0)
    total = values.new_zeros(values.shape[1:])
    for row in values:  # no copy of the rows passes through memory
        total.addcmul_(row, row)
    return total


def _pair_squares(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Return the sum over b of (sum_t e_bt x_bt^T)^2 without a row: a product of pairs (t, s).

    The square is ``sum_ts (e_t e_s) (x_t x_s)^T`` with elementwise products of two positions, and
    (s, t) gives what (t, s) gives.
    """
    positions = outputs.shape[1]
    if positions == 1:
        return outputs[:, 0].square().mT @ inputs[:, 0].square()
    first, second = torch.triu_indices(positions, positions, device=outputs.device).unbind()
    twice = torch.where(first == second, 1.0, 2.0).to(outputs.dtype).unsqueeze(1)
    left = (outputs[:, first] * outputs[:, second] * twice).flatten(0, 1)
    right = (inputs[:, first] * inputs[:, second]).flatten(0, 1)
    return left.mT @ right


def _one_hot_squares(outputs: Tensor, index: Tensor, size: int) -> Tensor:
    """Return the sum over b of (sum_t e_bt onehot(i_bt)^T)^2: what a token is given is added."""
    rows = torch.arange(len(index), device=index.device).unsqueeze(1)
    key, place = torch.unique(rows * size + index, return_inverse=True)
    width = outputs.shape[2]
    added = outputs.new_zeros(len(key), width)
    added.index_add_(0, place.flatten(), outputs.flatten(0, 1))
    total = outputs.new_zeros(size, width).index_add_(0, key % size, added.square_())
    return total.mT


# --- factors ------------------------------------------------------------------------------------
@frozen(eq=False)
class FactorSums:
    """Sums over the positions that count: those whose e x^T is not zero.

    A padded or masked position has no gradient; its input would only blur the factor. Both sides
    are looked at, since a tied weight may hold the factors of one of its layers turned around.
    """

    outputs: Tensor  # [O, O], sum of e e^T; [G, O, O] for rows of G groups
    inputs: Tensor  # [I, I], sum of x x^T; its diagonal [I] for one-hot inputs; [G, I, I]
    positions: int | Tensor  # how many; [G]


def factor_entries(block: Block) -> int:
    """Return how many numbers `factor_sums` makes.

    Raises:
        SpecError: The rows are formed.
    """
    if isinstance(block, GroupedBlock):
        groups, outputs, inputs = (*block.outputs.shape[2:], block.inputs.shape[3])
        return int(groups * (outputs * outputs + inputs * inputs))
    outer = _require_factors(block)
    outputs, inputs = outer.shape
    return outputs * outputs + (inputs if is_one_hot(outer.inputs) else inputs * inputs)


def factor_sums(block: Block, *, average: bool = False) -> FactorSums:
    """Return the sums of e e^T and x x^T over the positions of all rows.

    Args:
        block: Rows ``sum_t e_bt x_bt^T``, or stacks of such sums.
        average: Take one position for each row: the sum of e and the mean of x over those that
            count ("reduce" of Eschenhagen et al. 2023, arXiv 2311.00636). One-hot inputs keep their
            positions, so that their sum stays diagonal.

    Raises:
        SpecError: The rows are formed.
    """
    if isinstance(block, GroupedBlock):
        return _grouped_sums(accumulate(block.outputs), accumulate(block.inputs), average=average)
    outer = _require_factors(block)
    outputs = outer.outputs
    counted = (outputs != 0).any(2)  # [B, T]
    given = outer.own_inputs
    if isinstance(given, OneHot):
        chosen = outer.outputs[counted]
        tokens = given.index[counted]
        frequency = torch.bincount(tokens, minlength=given.size)
        frequency = frequency.to(torch.promote_types(outputs.dtype, torch.float32))
        return FactorSums(product(chosen.mT, chosen), frequency, len(chosen))
    inputs = given
    counted &= (inputs != 0).any(2)
    if average and outputs.shape[1] > 1:
        inputs, outputs = accumulate(inputs), accumulate(outputs)
        weights = counted.to(inputs.dtype)
        shares = weights / weights.sum(1, keepdim=True).clamp_min(1)
        inputs = (shares.unsqueeze(1) @ inputs).squeeze(1)
        outputs = (weights.unsqueeze(1) @ outputs).squeeze(1)
        counted = counted.any(1)
    else:
        inputs, outputs, counted = inputs.flatten(0, 1), outputs.flatten(0, 1), counted.flatten()
    if not bool(counted.all()):
        inputs, outputs = inputs[counted], outputs[counted]
    return FactorSums(product(outputs.mT, outputs), product(inputs.mT, inputs), len(outputs))


def _grouped_sums(outputs: Tensor, inputs: Tensor, *, average: bool) -> FactorSums:
    """Return the sums for each group of ``[B, T, G, O]`` and ``[B, T, G, I]``."""
    counted = (outputs != 0).any(3) & (inputs != 0).any(3)  # [B, T, G]
    weights = counted.to(outputs.dtype).unsqueeze(3)
    outputs, inputs = outputs * weights, inputs * weights
    if average:
        inputs = inputs.sum(1) / weights.sum(1).clamp_min(1)
        outputs, counted = outputs.sum(1), counted.any(1)
    else:
        inputs, outputs, counted = (
            inputs.flatten(0, 1),
            outputs.flatten(0, 1),
            counted.flatten(0, 1),
        )
    left, right = outputs.permute(1, 2, 0), inputs.permute(1, 2, 0)  # [G, O, B T]
    return FactorSums(left @ left.mT, right @ right.mT, counted.sum(0))


def _require_factors(block: Block) -> OuterBlock:
    if isinstance(block, OuterBlock):
        return block
    raise SpecError(
        f"factor sums: rows of shape {block.shape} are formed and have no factors; take a source "
        "that keeps them ('per-example')"
    )
