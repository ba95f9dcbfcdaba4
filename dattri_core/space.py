"""Spaces: what lives where in a row, without a tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from attrs import field, frozen

from dattri_core.errors import SpecError

Kind = Literal["outer", "grouped", "dense"]


def _shape(sizes: Iterable[int]) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes)


@frozen
class ParameterView:
    """Where one parameter lies in a block: columns ``start:stop`` of the block's matrix view.

    The matrix view of a block of shape ``[O, ...]`` is ``[O, prod(...)]``. With ``transposed`` the
    parameter is stored as the transpose of its columns (embeddings, Hugging Face ``Conv1D``).
    """

    parameter: str
    shape: tuple[int, ...]
    start: int
    stop: int
    transposed: bool = False


def _views(views: Iterable[ParameterView]) -> tuple[ParameterView, ...]:
    return tuple(views)


@frozen
class BlockSpec:
    """One block of a row: its name, the shape of one row, and whether it comes as factors.

    ``kind`` is ``"outer"`` when every row is a sum of outer products (a layer's weight gradient),
    so that a part may ask for its factors, ``"grouped"`` when it is a stack of such sums over parts
    of its outputs (a grouped convolution's), and ``"dense"`` otherwise.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...] = field(converter=_shape)
    parameters: tuple[ParameterView, ...] = field(default=(), converter=_views)

    def __attrs_post_init__(self) -> None:
        if self.kind != "dense" and len(self.shape) != 2:
            raise SpecError(
                f"block {self.name!r}: an {self.kind} block has shape (outputs, inputs), got "
                f"{self.shape}"
            )

    @property
    def size(self) -> int:
        """Return the number of entries of one row of this block."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Return the shape of the matrix view in which `ParameterView` columns count."""
        if not self.shape:
            return (1, 1)
        return (self.shape[0], math.prod(self.shape[1:]))


def _layouts(mine: BlockSpec, theirs: BlockSpec) -> str:
    if mine.parameters == theirs.parameters:
        return ""
    left, right = ([view.parameter for view in block.parameters] for block in (mine, theirs))
    return f" of parameters {left} against {right}"


def _blocks(blocks: Iterable[BlockSpec]) -> tuple[BlockSpec, ...]:
    return tuple(blocks)


@frozen
class Space:
    """An ordered list of blocks; two spaces that differ never meet silently."""

    blocks: tuple[BlockSpec, ...] = field(converter=_blocks)

    def __attrs_post_init__(self) -> None:
        seen: set[str] = set()
        for block in self.blocks:
            if block.name in seen:
                raise SpecError(f"space: two blocks are named {block.name!r}; names must differ")
            seen.add(block.name)

    def __iter__(self) -> Iterator[BlockSpec]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __contains__(self, name: object) -> bool:
        return any(block.name == name for block in self.blocks)

    def __getitem__(self, name: str) -> BlockSpec:
        for block in self.blocks:
            if block.name == name:
                return block
        raise SpecError(f"space: no block {name!r}; blocks: {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Return the block names in order."""
        return tuple(block.name for block in self.blocks)

    @property
    def dim(self) -> int:
        """Return the length d of one flat row."""
        return sum(block.size for block in self.blocks)

    @property
    def offsets(self) -> dict[str, int]:
        """Return the offset of each block in a flat row."""
        offsets, total = {}, 0
        for block in self.blocks:
            offsets[block.name] = total
            total += block.size
        return offsets

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Return the parameters that the blocks cover, in order of blocks."""
        return tuple(view.parameter for block in self.blocks for view in block.parameters)

    @property
    def covers_parameters(self) -> bool:
        """Return whether every entry of a row is an entry of a named parameter."""
        return all(
            sum(view.stop - view.start for view in block.parameters) == block.matrix_shape[1]
            for block in self.blocks
        )

    def select(self, names: Iterable[str]) -> Space:
        """Return the sub-space of the named blocks, in this space's order."""
        wanted = set(names)
        missing = wanted - set(self.names)
        if missing:
            raise SpecError(f"space: no block {sorted(missing)}; blocks: {', '.join(self.names)}")
        return Space(tuple(block for block in self.blocks if block.name in wanted))

    def to_json(self) -> list[dict[str, Any]]:
        """Return a JSON-ready description of the blocks."""
        return [
            {
                "name": block.name,
                "kind": block.kind,
                "shape": list(block.shape),
                "parameters": [
                    [view.parameter, list(view.shape), view.start, view.stop, view.transposed]
                    for view in block.parameters
                ],
            }
            for block in self.blocks
        ]

    @property
    def fingerprint(self) -> str:
        """Return a hash of names, kinds, shapes and parameter layout."""
        text = json.dumps(self.to_json(), separators=(",", ":"), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def require_same(self, other: Space, operation: str) -> None:
        """Raise `SpecError` that names the first difference when the two spaces differ."""
        if self is other or self == other:
            return
        for mine, theirs in zip(self.blocks, other.blocks, strict=False):
            if mine != theirs:
                raise SpecError(
                    f"{operation}: the spaces differ at block {mine.name!r} "
                    f"({mine.kind} {mine.shape}) against {theirs.name!r} "
                    f"({theirs.kind} {theirs.shape})"
                    f"{_layouts(mine, theirs)}; both sides must come from the same source "
                    "and the same projector"
                )
        raise SpecError(
            f"{operation}: the spaces have {len(self)} and {len(other)} blocks; "
            "both sides must come from the same source and the same projector"
        )
