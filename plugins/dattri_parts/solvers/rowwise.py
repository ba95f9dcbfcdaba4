"""Elementwise work on many rows at once, by block, a cache's worth at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from dattri_core import NumericsError, Rows

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


def unit_rows(rows: Rows, solver: str) -> tuple[Named, Tensor]:
    """Return g / |g| of every row, in new tensors of float32 or better, and |g|: ``[C]``.

    At unit length no square underflows, however small the gradient of a well-fitted example is. A
    row whose length does is zero.

    Args:
        rows: The right-hand sides of a solver.
        solver: Its name, for the error.

    Raises:
        NumericsError: A row is not finite.
    """
    formed = {name: rows.blocks[name].dense().values for name in rows.space.names}
    wide = {n: v.to(torch.promote_types(v.dtype, torch.float32)) for n, v in formed.items()}
    length = lengths(wide)
    if not bool(torch.isfinite(length).all()):
        raise NumericsError(f"solver {solver!r}: a right-hand side is not finite")
    tiny = max(torch.finfo(value.dtype).tiny for value in wide.values())
    length = length.where(length >= tiny, 0.0)
    inverse = (1 / length).where(length > 0, 0.0)
    return {name: value * column(inverse, value) for name, value in wide.items()}, length


def squares(values: Mapping[str, Tensor]) -> Tensor:
    """Return the squared length of each row over all blocks, in float64: ``[C]``."""
    norms = [torch.linalg.vector_norm(value.flatten(1), dim=1) for value in values.values()]
    return torch.stack(norms).double().square().sum(0)


def dots(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
    """Return the inner product of each row with the same row over all blocks, ``[C]``."""
    return torch.stack([(left[n] * right[n]).flatten(1).sum(1) for n in left]).double().sum(0)


def column(values: Tensor, like: Tensor) -> Tensor:
    """Return one number for each row, shaped to multiply the rows of ``like``, in its dtype."""
    return values.to(like.dtype).reshape(-1, *([1] * (like.dim() - 1)))
