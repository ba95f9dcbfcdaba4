"""Sketches of flat rows: one random matrix for the whole row, or one for each block.

What they share: the spaces after them, how rows go through their blocks, and the narrow protocol
`Kernel` that a random matrix answers. Coordinate d of a row is its place in the canonical flat
layout of the space (`dattri_core.Space.offsets`), so that no number depends on how rows are cut
into blocks, batches or parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Literal

import torch
from attrs import evolve, field, frozen
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from dattri_core import Block, BlockSpec, DenseBlock, LinearMap, Rows, Space

Scope = Literal["row", "block"]
SCOPES = ("row", "block")
SKETCH = "sketch"
"""Name of the block that is left of a whole row."""
FORMED_BYTES = 2**28
"""Of factored rows that are formed at once; more are formed a few outputs at a time."""


class Kernel(Protocol):
    """A random matrix ``M [K, D]`` that is never held: P = scale M, with E[P^T P] = I.

    Every entry is a pure function of a key and of its place, so it does not matter in which parts a
    row comes. The scale is apart, so that sums of integers stay exact.
    """

    @property
    def scale(self) -> float:
        """Return the number that M is to be multiplied with."""
        ...

    def add(self, values: Tensor, start: int, out: Tensor) -> None:
        """Add ``M[:, start:start+m] v`` for every row v to ``out``.

        Args:
            values: Rows ``[B, m]`` of any floating dtype, on any device.
            start: Coordinate of their first column.
            out: ``[B, K]`` on the same device, in float64 for rows of float64 and in float32 for
                all others; sums are taken in its dtype.
        """
        ...

    def adjoint(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]^T k`` for every row k of ``keys [B, K]``, ``[B, stop-start]``.

        The keys are float32 or float64, and so is the answer.
        """
        ...

    def matrix(self, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]`` in float64 on the CPU, ``[K, stop-start]``: the meaning."""
        ...


@runtime_checkable
class BlockKernel(Kernel, Protocol):
    """A kernel that needs a few entries of a block, which it reads without forming the rows."""

    def add_block(self, block: Block, start: int, out: Tensor) -> None:
        """Add ``M[:, start:start+m] v`` for every row v of a block of m numbers to ``out``."""
        ...


def sketched_space(space: Space, dim: int, scope: Scope) -> Space:
    """Return the space after a flat sketch to ``dim`` numbers, of the row or of each block.

    A block of at most ``dim`` numbers is left as it is where blocks are sketched one by one.
    """
    if scope == "row":
        return Space((BlockSpec(SKETCH, "dense", (dim,)),))
    return Space(
        tuple(spec if spec.size <= dim else BlockSpec(spec.name, "dense", (dim,)) for spec in space)
    )


def flat_map(
    projector: str, space: Space, dim: int, scope: Scope, kernel: Callable[..., Kernel]
) -> LinearMap:
    """Return the map of a flat sketch.

    Args:
        projector: Registered name, for messages.
        space: Of the rows.
        dim: K.
        scope: ``"row"`` or ``"block"``.
        kernel: Makes the random matrix: ``kernel()`` that of whole rows, ``kernel(name)`` that of
            a block, whose own coordinates begin at 0.
    """
    after = sketched_space(space, dim, scope)
    if scope == "row":
        return FlatMap(projector, space, after, kernel())
    sketched = {spec.name: kernel(spec.name) for spec in space if spec.size > dim}
    return BlockwiseFlatMap(projector, space, after, sketched)


@frozen(eq=False)
class FlatMap:
    """P g for whole rows: the sum over blocks k of P_k g_k, P_k the columns of block k.

    It is *additive*: rows that hold a part of the blocks are mapped to the sum over these, in the
    same space, so that a row may come block by block and what its parts give be added up.
    """

    projector: str
    in_space: Space
    out_space: Space
    kernel: Kernel
    offsets: Mapping[str, int] = field(init=False)
    blockwise: ClassVar[bool] = False
    additive: ClassVar[bool] = True

    @offsets.default
    def _offsets(self) -> Mapping[str, int]:
        return self.in_space.offsets

    def map(self, rows: Rows) -> Rows:
        """Return P g for every row g, or what a part of its blocks adds to it."""
        _require_part(self.projector, self.in_space, rows)
        total = torch.zeros(
            len(rows), self.out_space.dim, dtype=_wide(rows.dtype), device=rows.device
        )
        for spec in rows.space:
            _add(self.kernel, rows.blocks[spec.name], spec, self.offsets[spec.name], total)
        return _dense_rows(rows, self.out_space, {SKETCH: total.mul_(self.kernel.scale)})

    def adjoint(self, rows: Rows) -> Rows:
        """Return P^T k for every mapped row k, all blocks formed."""
        self.out_space.require_same(rows.space, f"adjoint of the projector {self.projector!r}")
        keys = _scaled(rows.blocks[SKETCH], self.kernel)
        raised = {
            spec.name: self.kernel.adjoint(
                keys, self.offsets[spec.name], self.offsets[spec.name] + spec.size
            )
            for spec in self.in_space
        }
        return _dense_rows(rows, self.in_space, raised)


@frozen(eq=False)
class BlockwiseFlatMap:
    """P_k g_k for each block k on its own; a block without a kernel is left as it is."""

    projector: str
    in_space: Space
    out_space: Space
    kernels: Mapping[str, Kernel]
    blockwise: ClassVar[bool] = True
    additive: ClassVar[bool] = False

    @property
    def is_identity(self) -> bool:
        """Return whether no block is long enough to be sketched."""
        return not self.kernels

    def map(self, rows: Rows) -> Rows:
        """Return the sketch of every block that the rows hold."""
        _require_part(self.projector, self.in_space, rows)
        space = self.out_space.select(rows.space.names)
        blocks = {spec.name: self._down(spec, rows.blocks[spec.name]) for spec in rows.space}
        return evolve(rows, space=space, blocks=blocks)

    def adjoint(self, rows: Rows) -> Rows:
        """Return P^T k for every mapped row k, or for those blocks that the rows hold."""
        operation = f"adjoint of the projector {self.projector!r}"
        self.out_space.select(rows.space.names).require_same(rows.space, operation)
        space = self.in_space.select(rows.space.names)
        blocks = {spec.name: self._up(spec, rows.blocks[spec.name]) for spec in space}
        return evolve(rows, space=space, blocks=blocks)

    def _down(self, spec: BlockSpec, block: Block) -> Block:
        kernel = self.kernels.get(spec.name)
        if kernel is None:
            return block
        size = self.out_space[spec.name].size
        total = torch.zeros(len(block), size, dtype=_wide(block.dtype), device=block.device)
        _add(kernel, block, spec, 0, total)
        return DenseBlock(total.mul_(kernel.scale))

    def _up(self, spec: BlockSpec, block: Block) -> Block:
        kernel = self.kernels.get(spec.name)
        if kernel is None:
            return block
        raised = kernel.adjoint(_scaled(block, kernel), 0, spec.size)
        return DenseBlock(raised.reshape(len(block), *spec.shape))


def _require_part(projector: str, space: Space, rows: Rows) -> None:
    space.select(rows.space.names).require_same(rows.space, f"projector {projector!r}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scaled(block: Block, kernel: Kernel) -> Tensor:
    keys = block.flat()
    return keys.to(_wide(keys.dtype)) * kernel.scale


def _dense_rows(rows: Rows, space: Space, flat: Mapping[str, Tensor]) -> Rows:
    blocks = {spec.name: flat[spec.name].reshape(len(rows), *spec.shape) for spec in space}
    return evolve(rows, space=space, blocks={n: DenseBlock(v) for n, v in blocks.items()})


def _add(kernel: Kernel, block: Block, spec: BlockSpec, start: int, total: Tensor) -> None:
    """Add the sketch of one block whose first coordinate is ``start``."""
    if isinstance(kernel, BlockKernel):
        kernel.add_block(block, start, total)
        return
    for at, values in _formed(block, spec):
        kernel.add(values, start + at, total)


def _formed(block: Block, spec: BlockSpec) -> Iterator[tuple[int, Tensor]]:
    """Yield the first column and the values ``[B, m]`` of a block, its factors formed in parts.

    Parts are those of a few outputs, and not of a few rows, for which a random matrix would have to
    be drawn again and again.
    """
    outputs, inputs = spec.matrix_shape
    per_output = max(1, len(block) * inputs * _wide(block.dtype).itemsize)
    step = max(1, FORMED_BYTES // per_output)
    if block.positions is None or spec.kind != "outer" or step >= outputs:
        yield 0, block.flat()
        return
    for first in range(0, outputs, step):
        chosen = slice(first, first + step)
        yield first * inputs, block.map(None, lambda e, chosen=chosen: e[..., chosen]).flat()
