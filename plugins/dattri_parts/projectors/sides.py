"""Sketches of the two sides of a layer: which sides they shorten, and the map P_out (x) P_in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Literal

import torch
from attrs import define, evolve, frozen
from torch import Tensor
from typing_extensions import Protocol

from dattri_core import Block, BlockSpec, DenseBlock, Rows, Selection, Space, SpecError

Uncovered = Literal["keep", "sketch", "drop"]
UNCOVERED = ("keep", "sketch", "drop")


MEAN = "norms-are-kept-in-the-mean"
"""The law of maps that are random, which what drops some of a row does not meet."""


def failures_of(uncovered: Uncovered) -> Mapping[str, str]:
    """Return the laws that a projector breaks by design, with the reason."""
    if uncovered != "drop":
        return {}
    return {MEAN: "rows without factors are dropped"}


@frozen
class SideRanks:
    """How many numbers are left of each side of a block; a side of at most so many is left alone.

    Args:
        projector: Registered name, for messages.
        outputs: r_out.
        inputs: r_in.
        uncovered: What becomes of rows that come without factors.
    """

    projector: str
    outputs: int
    inputs: int
    uncovered: Uncovered

    def out_space(self, space: Space) -> Space:
        """Return the space of sketched rows; a block that is left as it is keeps its parameters.

        Raises:
            SpecError: No block is left.
        """
        kept = tuple(self._sketched(spec) for spec in space if not self._drops(spec))
        if not kept:
            raise SpecError(
                f"projector {self.projector!r}: none of the blocks {', '.join(space.names)} has "
                "factors, and uncovered='drop' leaves nothing; give uncovered='sketch' or 'keep', "
                "or the source 'per-example', which gives factors"
            )
        return Space(kept)

    def sides(self, space: Space) -> Iterator[tuple[BlockSpec, str, int, int]]:
        """Yield block, side, rank and length of every side that is shortened."""
        for spec in space:
            if self._drops(spec) or (spec.kind == "dense" and self.uncovered == "keep"):
                continue
            for side, size in zip(("outputs", "inputs"), spec.matrix_shape, strict=True):
                rank = self.outputs if side == "outputs" else self.inputs
                if rank < size:
                    yield spec, side, rank, size

    def _drops(self, spec: BlockSpec) -> bool:
        return spec.kind == "dense" and self.uncovered == "drop"

    def _sketched(self, spec: BlockSpec) -> BlockSpec:
        ranks = {side: rank for _, side, rank, _ in self.sides(Space((spec,)))}
        if not ranks:
            return spec
        outputs, inputs = spec.matrix_shape
        shape = (ranks.get("outputs", outputs), ranks.get("inputs", inputs))
        return BlockSpec(spec.name, "outer" if spec.kind == "outer" else "dense", shape)


class Side(Protocol):
    """The linear map of one side, in the dtype of the rows."""

    def down(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | Tensor:
        """Return P of that side for rows of a dtype."""
        ...

    def up(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | Tensor:
        """Return its transpose."""
        ...


@define(eq=False)
class MatrixSide:
    """A matrix ``[r, size]``.

    The copy in the dtype of the rows is kept, so that it is made once and not for each batch.
    """

    matrix: Tensor
    _cast: Tensor | None = None

    def down(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in the dtype in which rows of ``dtype`` are added up."""
        wide = torch.promote_types(dtype, torch.float32)
        if self._cast is None or self._cast.dtype != wide:
            self._cast = self.matrix.to(wide)
        return self._cast

    def up(self, dtype: torch.dtype) -> Tensor:
        """Return its transpose."""
        return self.down(dtype).mT


@frozen(eq=False)
class SelectedSide:
    """Some entries of a side, and a scale: a matrix that is not written."""

    selection: Selection

    def down(self, dtype: torch.dtype) -> Selection:
        """Return the selection, whatever the dtype."""
        return self.selection

    def up(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """Return its transpose."""
        return self.selection.transposed


@frozen(eq=False)
class KroneckerMap:
    """P_out G P_in^T for every row and block, with its adjoint P_out^T K P_in.

    Args:
        projector: Registered name, for messages.
        in_space: Of rows.
        out_space: Of mapped rows.
        sides: P of each side that is shortened, by block and side.
    """

    projector: str
    in_space: Space
    out_space: Space
    sides: Mapping[tuple[str, str], Side]
    blockwise: ClassVar[bool] = True

    @property
    def is_identity(self) -> bool:
        """Return whether no side is long enough to be shortened, and no block was dropped."""
        return not self.sides and self.out_space == self.in_space

    def map(self, rows: Rows) -> Rows:
        """Return P g for every row g, whole or in parts."""
        self.in_space.select(rows.space.names).require_same(
            rows.space, f"projector {self.projector!r}"
        )
        kept = [name for name in rows.space.names if name in self.out_space]
        space = self.out_space.select(kept)
        blocks = {spec.name: self._down(spec, rows.blocks[spec.name]) for spec in space}
        return evolve(rows, space=space, blocks=blocks)

    def adjoint(self, rows: Rows) -> Rows:
        """Return P^T k for every mapped row k; blocks that were dropped are zero."""
        self.out_space.require_same(rows.space, f"adjoint of the projector {self.projector!r}")
        blocks: dict[str, Block] = {}
        for spec in self.in_space:
            if spec.name in rows.blocks:
                blocks[spec.name] = self._up(spec, rows.blocks[spec.name])
            else:
                zero = torch.zeros((), dtype=rows.dtype, device=rows.device)
                blocks[spec.name] = DenseBlock(zero.expand(len(rows), *spec.shape))
        return evolve(rows, space=self.in_space, blocks=blocks)

    def _down(self, spec: BlockSpec, block: Block) -> Block:
        inputs, outputs = (self.sides.get((spec.name, side)) for side in ("inputs", "outputs"))
        if inputs is None and outputs is None:
            return block
        if spec.kind == "dense":  # its matrix view; a layer's block is one already
            shape = self.in_space[spec.name].matrix_shape
            block = DenseBlock(block.flat().reshape(len(block), *shape))
        return block.map(
            None if inputs is None else inputs.down(block.dtype),
            None if outputs is None else outputs.down(block.dtype),
        )

    def _up(self, spec: BlockSpec, block: Block) -> Block:
        inputs, outputs = (self.sides.get((spec.name, side)) for side in ("inputs", "outputs"))
        if inputs is None and outputs is None:
            return block
        raised = block.map(
            None if inputs is None else inputs.up(block.dtype),
            None if outputs is None else outputs.up(block.dtype),
        )
        if spec.kind == "dense":
            return DenseBlock(raised.flat().reshape(len(block), *spec.shape))
        return raised
