"""Elementwise work on many rows at once, by block, a cache's worth at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Named: TypeAlias = dict[str, Tensor]
"""Values of C rows by block, ``[C, *shape]``."""

SLICE_BYTES = 2 * 2**20
"""Bytes of one tensor of a slice of rows: four of them stay in a processor's cache."""


def row_slices(values: Mapping[str, Tensor]) -> Iterator[slice]:
    """Yield ranges of rows, of which the largest block fits a cache; one range off the CPU."""
    first = next(iter(values.values()))
    count = len(first)
    each = max(v.numel() * v.element_size() for v in values.values()) // max(1, count)
    on_cpu = first.device.type == "cpu"
    step = max(1, SLICE_BYTES // max(1, each)) if on_cpu else max(1, count)
    for start in range(0, count, step):
        yield slice(start, start + step)


def lengths(values: Mapping[str, Tensor]) -> Tensor:
    """Return the length of each row over all blocks, ``[C]``, its squares taken in float64."""
    parts = []
    for value in values.values():
        each = value.numel() * value.element_size() // max(1, len(value))
        pieces = torch.split(value, max(1, SLICE_BYTES // max(1, each)))
        norms = [
            torch.linalg.vector_norm(piece.flatten(1), dim=1, dtype=torch.float64)
            for piece in pieces
        ]
        parts.append(torch.cat(norms))
    length: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return length


def squares(values: Mapping[str, Tensor]) -> Tensor:
    """Return the squared length of each row over all blocks, in float64: ``[C]``."""
    norms = [torch.linalg.vector_norm(value.flatten(1), dim=1) for value in values.values()]
    return torch.stack(norms).double().square().sum(0)


def column(values: Tensor, like: Tensor) -> Tensor:
    """Return one number for each row, shaped to multiply the rows of ``like``, in its dtype."""
    return values.to(like.dtype).reshape(-1, *([1] * (like.dim() - 1)))
