"""Eigenvectors of the diagonal blocks of a curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import Block, BlockSpec, DenseBlock, Rows, Space


@frozen(eq=False)
class BlockBasis:
    """Q: orthonormal columns of each block, applied to formed rows.

    Args:
        space: Of the rows.
        columns: By block, ``[size, k]`` in float64; k < size where the others have no curvature.
    """

    space: Space
    columns: Mapping[str, Tensor]
    blockwise: ClassVar[bool] = True

    @property
    def out_space(self) -> Space:
        """Return the blocks in the coordinates of their eigenvectors."""
        return Space(
            tuple(
                BlockSpec(spec.name, "dense", (self.columns[spec.name].shape[1],))
                for spec in self.space
            )
        )

    @property
    def nbytes(self) -> int:
        """Return the bytes of the columns."""
        return sum(values.numel() * values.element_size() for values in self.columns.values())

    def map(self, rows: Rows) -> Rows:
        """Return Q^T g, in float32 or better; the rows may hold a part of the blocks."""
        self.space.select(rows.space.names).require_same(rows.space, "eigenbasis")
        blocks: dict[str, Block] = {}
        for name, block in rows.blocks.items():
            flat = _wide(block.flat())
            blocks[name] = DenseBlock(flat @ self.columns[name].to(flat))
        return Rows(self.out_space.select(rows.space.names), blocks, rows.index, rows.aux)

    def adjoint(self, rows: Rows) -> Rows:
        """Return Q k; the rows may hold a part of the blocks."""
        self.out_space.select(rows.space.names).require_same(rows.space, "adjoint of an eigenbasis")
        space = self.space.select(rows.space.names)
        blocks: dict[str, Block] = {}
        for spec in space:
            flat = _wide(rows.blocks[spec.name].flat())
            values = flat @ self.columns[spec.name].to(flat).mT
            blocks[spec.name] = DenseBlock(values.reshape(len(rows), *spec.shape))
        return Rows(space, blocks, rows.index, rows.aux)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
