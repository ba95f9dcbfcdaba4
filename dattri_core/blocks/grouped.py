"""Rows as stacks of factors: what a grouped convolution's gradient is."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from dattri_core.blocks.block import Block, LinearFunction, column
from dattri_core.blocks.dense import DenseBlock
from dattri_core.blocks.finite import all_finite
from dattri_core.blocks.inputs import accumulate
from dattri_core.contract import Order, Shape
from dattri_core.errors import SpecError


@frozen(eq=False)
class GroupedBlock:
    """B rows of shape ``(G O, I)``: G sums of outer products, one above the other.

    Group g of row b is ``sum_t outputs[b,t,g] (x) inputs[b,t,g]``. A formed row is G times smaller
    than one of a layer without groups, so products form rows; the factors are there for parts that
    ask for their moments.
    """

    outputs: Tensor  # [B, T, G, O]
    inputs: Tensor  # [B, T, G, I]

    def __attrs_post_init__(self) -> None:
        if self.outputs.dim() != 4 or self.outputs.shape[:3] != self.inputs.shape[:3]:
            raise SpecError(
                f"grouped block: outputs {tuple(self.outputs.shape)} and inputs "
                f"{tuple(self.inputs.shape)} must be [B, T, G, O] and [B, T, G, I] with equal B, T "
                "and G"
            )

    def __len__(self) -> int:
        return int(self.outputs.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape (G O, I) of one row."""
        return (int(self.outputs.shape[2] * self.outputs.shape[3]), int(self.inputs.shape[3]))

    @property
    def positions(self) -> int | None:
        """Return the number of outer products T of a group."""
        return int(self.outputs.shape[1])

    @property
    def planned(self) -> Shape:
        """Return the shape of formed rows, since all products form them."""
        outputs, inputs = self.shape
        return Shape(len(self), None, outputs, inputs)

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
        return sum(t.numel() * t.element_size() for t in (self.outputs, self.inputs))

    def dense(self) -> DenseBlock:
        """Form the rows, ``[B, G O, I]``."""
        # btgo,btgi->bgoi as one batched product
        left = accumulate(self.outputs).permute(0, 2, 3, 1)
        formed = left @ accumulate(self.inputs).transpose(1, 2)
        return DenseBlock(formed.reshape(len(self), *self.shape))

    def flat(self) -> Tensor:
        """Return the formed rows flat, ``[B, d]``."""
        return self.dense().flat()

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return ``sum_b coefficients[c, b] row_b``, formed: ``[C, G O, I]``."""
        return self.dense().combine(coefficients)

    def inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return all inner products ``[B, C]`` with the rows of ``other``."""
        return self.dense().inner(other, order=order, limit=limit)

    def pair_inner(
        self, other: Block, *, order: Order | None = None, limit: int | None = None
    ) -> Tensor:
        """Return the inner product of each row with the same row of ``other``, ``[B]``."""
        return self.dense().pair_inner(other, order=order, limit=limit)

    def map(
        self, on_inputs: LinearFunction | None, on_outputs: LinearFunction | None
    ) -> DenseBlock:
        """Apply linear functions of the last axis to the formed rows; None leaves a side."""
        return self.dense().map(on_inputs, on_outputs)

    def scale(self, weights: Tensor) -> GroupedBlock:
        """Multiply row b by ``weights[b]``."""
        return GroupedBlock(self.outputs * column(weights, self.outputs), self.inputs)

    def take(self, index: Tensor | slice) -> GroupedBlock:
        """Return the chosen rows."""
        return GroupedBlock(self.outputs[index], self.inputs[index])

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> GroupedBlock:
        """Return the rows on another device or in another dtype."""
        outputs = self.outputs.to(device=device, dtype=dtype)
        inputs = self.inputs.to(device=device, dtype=dtype)
        same = outputs is self.outputs and inputs is self.inputs
        return self if same else GroupedBlock(outputs, inputs)

    def is_finite(self) -> bool:
        """Return whether every number is finite."""
        return all_finite(self.outputs) and all_finite(self.inputs)
