"""The operator of a curvature that is diagonal in a Kronecker basis of each block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core import Block, BlockSpec, DenseBlock, OuterBlock, Rows, Space


@frozen(eq=False)
class Kronecker:
    """Orthonormal eigenvectors of the two sides of a block, as columns; None: the unit vectors.

    A block of G groups has those of each group, and its rows are formed.
    """

    outputs: Tensor | None  # [O, O] or [G, O, O]
    inputs: Tensor | None  # [I, I] or [G, I, I]

    @property
    def grouped(self) -> bool:
        """Return whether each group has its own."""
        return self.outputs is not None and self.outputs.dim() == 3

    @property
    def on_inputs(self) -> Tensor | None:
        """Return Q_I^T."""
        return None if self.inputs is None else self.inputs.mT

    @property
    def on_outputs(self) -> Tensor | None:
        """Return Q_O^T."""
        return None if self.outputs is None else self.outputs.mT

    @property
    def nbytes(self) -> int:
        """Return the bytes of the eigenvectors."""
        sides = (side for side in (self.outputs, self.inputs) if side is not None)
        return sum(side.numel() * side.element_size() for side in sides)

    def turned(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a row in these coordinates; no groups."""
        pairs = zip((self.outputs, self.inputs), shape, strict=True)
        return tuple(size if q is None else q.shape[1] for q, size in pairs)

    def leading(self, rows: Tensor, columns: Tensor) -> Kronecker:
        """Return some of the eigenvectors: those that are marked, of sides that have any."""
        outputs = self.outputs if self.outputs is None else self.outputs[:, rows]
        inputs = self.inputs if self.inputs is None else self.inputs[:, columns]
        return Kronecker(outputs, inputs)

    def turn(self, block: Block) -> Block:
        """Return Q_O^T G Q_I for every row G."""
        if self.grouped:
            return self._of_groups(block, transposed=False)
        if self._smaller_formed(block):
            block = block.dense()
        return block.map(self.on_inputs, self.on_outputs)

    def _smaller_formed(self, block: Block) -> bool:
        """Return whether turning rows that are formed is less work: of many positions, few weights.

        Then they are fewer numbers as well, since T (O^2 + I^2) > O I (O + I) makes
        T (O + I) > O I.
        """
        if not isinstance(block, OuterBlock) or block.planned.one_hot:
            return False
        (outputs, inputs), positions = block.shape, block.positions or 0
        each = (0 if self.outputs is None else outputs), (0 if self.inputs is None else inputs)
        factors = positions * (outputs * each[0] + inputs * each[1] + outputs * inputs)
        formed = outputs * inputs * (positions + sum(each))
        return positions > 1 and formed < factors

    def back(self, block: Block) -> Block:
        """Return Q_O K Q_I^T for every row K."""
        if self.grouped:
            return self._of_groups(block, transposed=True)
        return block.map(self.inputs, self.outputs)

    def _of_groups(self, block: Block, *, transposed: bool) -> Block:
        assert self.outputs is not None
        assert self.inputs is not None
        values = block.dense().values
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        left, right = self.outputs.to(values.dtype), self.inputs.to(values.dtype)
        if transposed:
            left, right = left.mT, right.mT
        parted = values.reshape(len(block), *left.shape[:2], -1)  # [B, G, O, I]
        return DenseBlock((left.mT @ parted @ right).flatten(1, 2))


@frozen(eq=False)
class KroneckerBasis:
    """Q: orthonormal columns of each block, Kronecker products or unit vectors.

    Args:
        space: Of the rows.
        sides: By block; blocks that are left out keep their own coordinates.
        dropped: Blocks without a column.
    """

    space: Space
    sides: Mapping[str, Kronecker]
    dropped: frozenset[str] = frozenset()
    blockwise: ClassVar[bool] = True

    @property
    def nbytes(self) -> int:
        """Return the bytes of the eigenvectors."""
        return sum(sides.nbytes for sides in self.sides.values())

    @property
    def out_space(self) -> Space:
        """Return the blocks in the coordinates of their eigenvectors; a dropped one is empty."""
        return Space(tuple(self._turned(spec) for spec in self.space))

    def map(self, rows: Rows) -> Rows:
        """Return Q^T g, factored where g is; the rows may hold a part of the blocks."""
        self.space.select(rows.space.names).require_same(rows.space, "eigenbasis")
        blocks: dict[str, Block] = {}
        for name, block in rows.blocks.items():
            if name in self.dropped:
                blocks[name] = DenseBlock(block.flat()[:, :0])
            else:
                blocks[name] = self.sides[name].turn(block) if name in self.sides else block
        space = Space(tuple(self._turned(spec) for spec in rows.space))
        return Rows(space, blocks, rows.index, rows.aux)

    def adjoint(self, rows: Rows) -> Rows:
        """Return Q k; the rows may hold a part of the blocks."""
        space = self.space.select(rows.space.names)
        wanted = Space(tuple(self._turned(spec) for spec in space))
        wanted.require_same(rows.space, "adjoint of an eigenbasis")
        blocks: dict[str, Block] = {}
        for spec in space:
            block = rows.blocks[spec.name]
            if spec.name in self.dropped:
                blocks[spec.name] = DenseBlock(block.flat().new_zeros(len(rows), *spec.shape))
            else:
                sides = self.sides.get(spec.name)
                blocks[spec.name] = block if sides is None else sides.back(block)
        return Rows(space, blocks, rows.index, rows.aux)

    def _turned(self, spec: BlockSpec) -> BlockSpec:
        if spec.name in self.dropped:
            return BlockSpec(spec.name, "dense", (0,))
        shape = spec.shape
        if spec.name in self.sides and not self.sides[spec.name].grouped:
            shape = self.sides[spec.name].turned(shape)
        return BlockSpec(spec.name, "outer" if spec.kind == "outer" else "dense", shape)


@frozen(eq=False)
class KroneckerSpectrum:
    """H = Q diag(L) Q^T, block diagonal.

    Args:
        basis: Q.
        eigenvalues: L by block, each of the shape of one row.
        dtype: In which it was computed.
        memory: Bytes that work with it may use.
        complete: Whether Q has every eigenvector; the eigenvalues of the others are zero.
    """

    basis: KroneckerBasis
    eigenvalues: Mapping[str, Tensor]
    dtype: torch.dtype
    memory: int
    complete: bool = True

    @property
    def space(self) -> Space:
        """Return the space of the rows."""
        return self.basis.space

    def apply(self, rows: Rows) -> Rows:
        """Return H g for every row g, in the rows' dtype."""
        turned = self.basis.map(rows)
        blocks: dict[str, Block] = {}
        for name, block in turned.blocks.items():
            values = block.dense().values
            blocks[name] = DenseBlock(values * self.eigenvalues[name].to(values))
        answer = self.basis.adjoint(Rows(turned.space, blocks, rows.index, rows.aux))
        return answer.to(dtype=rows.dtype)

    def leading(self, least: Mapping[str, float]) -> KroneckerSpectrum:
        """Return H without eigenvectors of a side all of whose eigenvalues are at most ``least``.

        A rotation then takes a part of its work. No entry of H changes by more than ``least`` of
        its block, as no eigenvalue does.
        """
        sides, eigenvalues = dict(self.basis.sides), dict(self.eigenvalues)
        for name, each in self.basis.sides.items():
            if each.grouped:
                continue
            large = self.eigenvalues[name] > least[name]
            every = torch.ones_like(large)
            rows = (every if each.outputs is None else large).any(1)
            columns = (every if each.inputs is None else large).any(0)
            sides[name] = each.leading(rows, columns)
            eigenvalues[name] = self.eigenvalues[name][rows][:, columns]
        return evolve(
            self, basis=evolve(self.basis, sides=sides), eigenvalues=eigenvalues, complete=False
        )

    def dense(self) -> Tensor:
        """Return H in float64, ``[d, d]``."""
        device = next(iter(self.eigenvalues.values())).device
        matrix = torch.zeros(self.space.dim, self.space.dim, dtype=torch.float64, device=device)
        for name, offset in self.space.offsets.items():
            space = self.space.select([name])
            units = torch.eye(space.dim, dtype=torch.float64, device=device)
            rows = Rows.from_flat(space, units, torch.arange(space.dim))
            where = slice(offset, offset + space.dim)
            matrix[where, where] = self.apply(rows).flat()
        return matrix
