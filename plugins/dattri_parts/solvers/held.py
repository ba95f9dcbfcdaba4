"""Rows of a curvature, held in memory, and what a solver reads off them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dattri_core import Block, Damping, Rows, RowsOperator, compact, share

TILE = 2048
"""Rows and columns of a Gram matrix that are computed at once."""


def hold(
    operator: RowsOperator, device: torch.device, fits: Callable[[int, int], bool]
) -> Rows | None:
    """Return all rows of a curvature in as few bytes as they take, or None where they do not fit.

    Rows of one example keep the inputs that they share once, and layers with many positions and few
    weights are formed.

    Args:
        operator: Reads its rows.
        device: Where they live.
        fits: Whether so many rows of so many bytes may be held; asked as they are read.
    """
    parts: list[Rows] = []
    count = size = 0
    for part in operator.rows():
        index = part.index
        kept = part.map_blocks(lambda _, block, index=index: compact(share(block, index)))  # type: ignore[misc]
        parts.append(kept)
        count, size = count + len(kept), size + kept.nbytes
        if not fits(count, size):
            return None
    if not parts:
        nothing = torch.zeros(0, operator.space.dim, dtype=operator.dtype, device=device)
        return Rows.from_flat(operator.space, nothing, torch.arange(0))
    return Rows.concatenate(parts)


def groups_of(operator: RowsOperator) -> dict[str, tuple[str, ...]]:
    """Return the blocks that are inverted together: each alone, or all of them, named ``"all"``."""
    names = operator.space.names
    return {name: (name,) for name in names} if operator.blockwise else {"all": names}


def squares_of(rows: Rows, groups: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Return the squared length of each row in the blocks of each group, ``[m]`` in float64."""
    found = {}
    for group, names in groups.items():
        parts = [rows.blocks[name].pair_inner(rows.blocks[name]).double() for name in names]
        found[group] = torch.stack(parts).sum(0)
    return found


def without_negligible(rows: Rows, groups: Mapping[str, Sequence[str]], precision: float) -> Rows:
    """Return the rows without the smallest ones, which together are rounding of the largest.

    What is left out of sum r r^T has a norm of ``precision`` times the largest squared row at most,
    which is no more than the rounding of its largest eigenvalue. A classifier that is sure of most
    examples has many such rows.
    """
    keep = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for squares in squares_of(rows, groups).values():
        ordered, place = squares.sort()
        small = ordered.cumsum(0) <= precision * ordered[-1:].clamp_min(0)
        keep[place[~small]] = True
    return rows if bool(keep.all()) else rows.take(keep.nonzero().flatten().cpu())


def absolute_dampings(
    damping: Damping, traces: Mapping[str, float], sizes: Mapping[str, int]
) -> dict[str, float]:
    """Return lambda of each group in the unit of the curvature.

    Relative to the mean eigenvalue of the group, or, where that is zero, of the whole curvature.

    Args:
        damping: As it was given.
        traces: Of H, by group.
        sizes: Numbers of a row, by group.

    Raises:
        NumericsError: It is relative to a curvature that is zero.
    """
    mean = sum(traces.values()) / max(1, sum(sizes.values()))
    return {
        name: damping.absolute(trace / sizes[name] if trace > 0 else mean)
        for name, trace in traces.items()
    }


def gram(blocks: Sequence[Block]) -> Tensor:
    """Return all inner products of rows with each other, summed over blocks, ``[m, m]``.

    In the dtype of the blocks' own sums, tile by tile; tiles below the diagonal are mirrored.
    """
    count = len(blocks[0])
    matrix: Tensor | None = None
    for top in range(0, max(1, count), TILE):
        rows = slice(top, min(top + TILE, count))
        upper = [block.take(rows) for block in blocks]
        for left in range(top, max(1, count), TILE):
            columns = slice(left, min(left + TILE, count))
            other = upper if left == top else [block.take(columns) for block in blocks]
            total = upper[0].inner(other[0])
            for one, two in zip(upper[1:], other[1:], strict=True):
                total += one.inner(two)
            if matrix is None:
                matrix = total.new_empty(count, count)
            matrix[rows, columns] = total
            if left != top:
                matrix[columns, rows] = total.mT
    assert matrix is not None
    return matrix
