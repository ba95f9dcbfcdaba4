"""Rows: the one data type between parts. Axes: B and C rows, d flat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from dattri_core.blocks import Block, DenseBlock, concatenate
from dattri_core.contract import Order
from dattri_core.errors import SpecError
from dattri_core.space import Space


@frozen(eq=False)
class Rows:
    """B rows: blocks by name, their positions in the data set, and auxiliary numbers per row.

    Blocks stand in the order of the space, whichever order they are given in: a source may finish
    the last layer first.
    """

    space: Space
    blocks: Mapping[str, Block]
    index: Tensor  # [B], position in the data set
    aux: Mapping[str, Tensor] = field(factory=dict)  # each [B]

    def __attrs_post_init__(self) -> None:
        if set(self.blocks) != set(self.space.names):
            raise SpecError(
                f"rows: blocks {sorted(self.blocks)} do not match the space's "
                f"{sorted(self.space.names)}"
            )
        if tuple(self.blocks) != self.space.names:
            ordered = {name: self.blocks[name] for name in self.space.names}
            object.__setattr__(self, "blocks", ordered)
        for spec in self.space:
            block = self.blocks[spec.name]
            if block.shape != spec.shape or len(block) != len(self.index):
                raise SpecError(
                    f"rows: block {spec.name!r} holds {len(block)} rows of shape {block.shape}; "
                    f"the space says shape {spec.shape} and the index {len(self.index)} rows"
                )
        wrong = [key for key, values in self.aux.items() if len(values) != len(self.index)]
        if wrong:
            raise SpecError(f"rows: aux {wrong} must hold one number for each of {len(self)} rows")

    def __len__(self) -> int:
        return int(self.index.shape[0])

    @staticmethod
    def from_flat(
        space: Space, flat: Tensor, index: Tensor, aux: Mapping[str, Tensor] | None = None
    ) -> Rows:
        """Cut flat rows ``[B, d]`` into the blocks of a space."""
        if flat.dim() != 2 or flat.shape[1] != space.dim:
            raise SpecError(
                f"rows from flat: got {tuple(flat.shape)}, the space needs [B, {space.dim}]"
            )
        parts = torch.split(flat, [spec.size for spec in space], dim=1)
        blocks = {
            spec.name: DenseBlock(part.reshape(len(flat), *spec.shape))
            for spec, part in zip(space, parts, strict=True)
        }
        return Rows(space, blocks, index, aux or {})

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """Join rows of one space."""
        first = parts[0]
        if len(parts) == 1:
            return first
        for part in parts[1:]:
            first.space.require_same(part.space, "concatenate rows")
        return Rows(
            first.space,
            {name: concatenate([p.blocks[name] for p in parts]) for name in first.space.names},
            torch.cat([p.index for p in parts]),
            {key: torch.cat([p.aux[key] for p in parts]) for key in first.aux},
        )

    @property
    def nbytes(self) -> int:
        """Return the bytes held."""
        return sum(block.nbytes for block in self.blocks.values())

    @property
    def device(self) -> torch.device:
        """Return the device of the rows."""
        return self.blocks[self.space.names[0]].device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the rows."""
        return self.blocks[self.space.names[0]].dtype

    def flat(self) -> Tensor:
        """Return the formed rows ``[B, d]`` in the order of the space."""
        return torch.cat([self.blocks[name].flat() for name in self.space.names], dim=1)

    def inner(self, other: Rows, *, order: Order | None = None) -> Tensor:
        """Return all inner products ``[B, C]``, summed over blocks."""
        self.space.require_same(other.space, "inner product of rows")
        parts = [self.blocks[n].inner(other.blocks[n], order=order) for n in self.space.names]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def pair_inner(self, other: Rows) -> Tensor:
        """Return the inner product of each row with the same row of ``other``, ``[B]``."""
        self.space.require_same(other.space, "pairwise inner product of rows")
        parts = [self.blocks[n].pair_inner(other.blocks[n]) for n in self.space.names]
        return torch.stack(parts).sum(0)

    def map_blocks(self, function: Callable[[str, Block], Block]) -> Rows:
        """Apply a function that keeps shapes to every block."""
        return evolve(self, blocks={n: function(n, self.blocks[n]) for n in self.space.names})

    def scale(self, weights: Tensor) -> Rows:
        """Multiply row b by ``weights[b]``."""
        return self.map_blocks(lambda _, block: block.scale(weights))

    def select(self, names: Iterable[str]) -> Rows:
        """Return the rows' part in the named blocks, in the space of these alone."""
        space = self.space.select(names)
        return evolve(self, space=space, blocks={n: self.blocks[n] for n in space.names})

    def take(self, index: Tensor | slice) -> Rows:
        """Return the chosen rows with their positions and auxiliary numbers.

        An index may be on any device: positions stay on the CPU while blocks are on another one.
        """

        def chosen(values: Tensor) -> Tensor:
            return values[index.to(values.device) if isinstance(index, Tensor) else index]

        return Rows(
            self.space,
            {name: block.take(index) for name, block in self.blocks.items()},
            chosen(self.index),
            {key: chosen(value) for key, value in self.aux.items()},
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Rows:
        """Return the rows on another device or in another dtype; indices stay where they are."""
        return self.map_blocks(lambda _, block: block.to(device, dtype))
