"""Nests of tensors as rows: one dense block for each tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import BlockSpec, DenseBlock, InputError, Rows, Space, map_tensors


@frozen(eq=False)
class Layout:
    """Where each tensor of a nest lies in a row.

    Args:
        nest: Tensors that show the structure: a tensor, a dict, tuple or list of them, any nest.
        space: One block a tensor, in the order of the nest.
        dtype: Of all tensors.
        device: Of all tensors.
    """

    nest: Any
    space: Space
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(nest: Any, what: str, axes: int = 0) -> Layout:
        """Return the layout of a nest.

        Args:
            nest: Floating point tensors of one dtype on one device.
            what: How messages call it.
            axes: Leading axes of each tensor that count vectors.

        Raises:
            InputError: It holds other tensors, or none.
        """
        nest = map_tensors(lambda tensor: tensor, nest)  # arrays become tensors
        named = dict(_named(nest))
        kinds = {(tensor.dtype, tensor.device) for tensor in named.values()}
        if len(kinds) != 1 or not next(iter(kinds))[0].is_floating_point:
            got = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise InputError(
                f"{what}: expected floating point tensors of one dtype on one device, got "
                f"{got or 'no tensor'}"
            )
        ((dtype, device),) = kinds
        blocks = [BlockSpec(name, "dense", tensor.shape[axes:]) for name, tensor in named.items()]
        return Layout(nest, Space(blocks), dtype, device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of the nest in order."""
        return tuple(tensor for _, tensor in _named(self.nest))

    def read(self, vectors: Any, what: str) -> tuple[tuple[Tensor, ...], bool]:
        """Return the tensors of a nest of vectors, and whether they hold several vectors each.

        Args:
            vectors: Like the nest: tensors of its shapes, one vector, or all with one more axis in
                front, ``[C, *shape]``, C vectors.
            what: How messages call the work.

        Raises:
            InputError: The structure or a shape is another one.
        """
        named = dict(_named(vectors))
        wanted = {spec.name: spec.shape for spec in self.space}
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        counts = {shape[:1] for shape in shapes.values()}
        many = shapes != wanted
        if many and (len(counts) != 1 or {n: s[1:] for n, s in shapes.items()} != wanted):
            raise InputError(
                f"{what}: the vectors have shapes {shapes}, expected {wanted}, or the same with "
                "one more axis in front for several vectors"
            )
        return tuple(named[spec.name].to(self.dtype) for spec in self.space), many

    def rows(self, vectors: Any, what: str) -> tuple[Rows, bool]:
        """Return a nest of vectors as rows, one or several, and whether they are several."""
        tensors, many = self.read(vectors, what)
        batched = [tensor.detach() if many else tensor.detach().unsqueeze(0) for tensor in tensors]
        blocks = {s.name: DenseBlock(t) for s, t in zip(self.space, batched, strict=True)}
        return Rows(self.space, blocks, torch.arange(len(batched[0]))), many

    def nest_of(self, rows: Rows, many: bool) -> Any:
        """Return rows as a nest like the one that they came from."""
        values = [rows.blocks[name].dense().values for name in self.space.names]
        return self.fill(value if many else value[0] for value in values)

    def fill(self, values: Iterable[Tensor]) -> Any:
        """Return the nest with other tensors, in order."""
        waiting = iter(values)
        return map_tensors(lambda _: next(waiting), self.nest)


def _named(nest: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a nest with names, in the order of `map_tensors`."""
    if isinstance(nest, Tensor):
        yield path or "value", nest
    elif isinstance(nest, Mapping):
        for key, item in nest.items():
            yield from _named(item, f"{path}.{key}" if path else str(key))
    elif isinstance(nest, (tuple, list)):
        for position, item in enumerate(nest):
            yield from _named(item, f"{path}.{position}" if path else str(position))
