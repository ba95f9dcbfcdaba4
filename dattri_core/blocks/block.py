"""What every kind of block answers. Axes: B and C rows, T and S positions, O outputs, I inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from dattri_core.contract import Order, Plan, Shape, plan_inner, with_rows
from dattri_core.errors import SpecError

if TYPE_CHECKING:
    from dattri_core.blocks.dense import DenseBlock

LinearFunction: TypeAlias = Callable[[Tensor], Tensor] | Tensor
"""Of the last axis, the same for every row and position: a function, or a matrix ``[k, I]``."""


@runtime_checkable
class Block(Protocol):
    """B rows of one parameter block. Only the modules of this package know which kinds there are.

    The kinds stand in one order: formed rows, factors, spans, sums. A kind multiplies itself with
    those before it, and lets those after it lead, so that a new kind is one new module.
    """

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one row."""
        ...

    @property
    def positions(self) -> int | None:
        """Return of how many products a row is the sum; None once it is formed."""
        ...

    @property
    def planned(self) -> Shape:
        """Return what the contraction planner needs to know."""
        ...

    @property
    def device(self) -> torch.device:
        """Return where the numbers live."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the numbers."""
        ...

    @property
    def nbytes(self) -> int:
        """Return the bytes held."""
        ...

    def dense(self) -> DenseBlock:
        """Form the rows."""
        ...

    def flat(self) -> Tensor:
        """Return the formed rows flat, ``[B, d]``."""
        ...

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return ``sum_b coefficients[c, b] row_b``, formed: ``[C, *shape]``."""
        ...

    def inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return all inner products ``[B, C]`` with the rows of ``other``.

        Args:
            other: Rows of the same shape.
            order: Of multiplication; default the cheapest.
            limit: Bytes of intermediates; default `dattri_core.contract.limit_now`.
        """
        ...

    def pair_inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return the inner product of each row with the same row of ``other``, ``[B]``."""
        ...

    def map(self, on_inputs: LinearFunction | None, on_outputs: LinearFunction | None) -> Block:
        """Apply linear functions of the last axis to inputs and outputs; None leaves a side.

        A function treats every vector alike and takes any number of them: what it is applied to
        need not be the rows, but the base that they are combinations of, or inputs that they share.
        """
        ...

    def scale(self, weights: Tensor) -> Block:
        """Multiply row b by ``weights[b]``."""
        ...

    def take(self, index: Tensor | slice) -> Block:
        """Return the chosen rows."""
        ...

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Block:
        """Return the rows on another device or in another dtype."""
        ...

    def is_finite(self) -> bool:
        """Return whether every number is finite."""
        ...


def explain_inner(left: Block, right: Block, order: Order | None = None) -> Plan:
    """Return the plan that `inner` follows for these two blocks."""
    return plan_inner(left.planned, right.planned, order=order, item=item_of(left))


def inner_work(block: Block, rows: int, others: int) -> int:
    """Return the multiply-adds of the inner products of so many rows like these with others."""
    sides = (with_rows(block.planned, count) for count in (rows, others))
    return plan_inner(*sides, item=item_of(block)).multiply_adds


def item_of(block: Block) -> int:
    """Return the bytes of one number in sums."""
    return max(4, block.dtype.itemsize)


def require_alike(left: Block, right: Block, operation: str, *, paired: bool = False) -> None:
    """Raise `SpecError` unless the rows of two blocks have one shape, and one count if paired."""
    if left.shape != right.shape:
        raise SpecError(f"{operation}: rows of shape {left.shape} meet rows of {right.shape}")
    if paired and len(left) != len(right):
        raise SpecError(f"{operation}: {len(left)} rows meet {len(right)}; counts must be equal")


def doubled(left: Block, right: Block) -> tuple[Block, Block] | None:
    """Return both blocks in float64 where one of them is and the other is not, else None.

    A model may hold some of its weights in float64, and an answer has the dtype of its rows.
    """
    if (left.dtype == torch.float64) == (right.dtype == torch.float64):
        return None
    return left.to(None, torch.float64), right.to(None, torch.float64)


def column(weights: Tensor, values: Tensor) -> Tensor:
    """Return one weight a row in a shape that multiplies values ``[B, ...]``."""
    return weights.to(values).reshape(-1, *([1] * (values.dim() - 1)))
