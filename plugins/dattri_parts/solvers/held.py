"""Rows of a curvature as solvers hold them, and what they read off their lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dattri_core import Block, Damping, Rows, RowsOperator, compact, share


def kept(rows: Rows) -> Rows:
    """Return the rows in as few bytes as they take.

    Rows of one example keep the inputs that they share once, and layers with many positions and few
    weights are formed.
    """
    return rows.map_blocks(lambda _, block: compact(share(block, rows.index)))


def groups_of(operator: RowsOperator) -> dict[str, tuple[str, ...]]:
    """Return the blocks that are inverted together: each alone, or all of them, named ``"all"``."""
    names = operator.space.names
    return {name: (name,) for name in names} if operator.blockwise else {"all": names}


def squares_of(blocks: Sequence[Block]) -> Tensor:
    """Return the squared length of each row over some blocks, ``[m]`` in float64."""
    return torch.stack([block.pair_inner(block).double() for block in blocks]).sum(0)


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


def damping_stats(dampings: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the mean damping over all numbers of a row, and its range where groups differ."""
    weighted = sum(dampings[name] * sizes[name] for name in dampings)
    if len(set(dampings.values())) == 1:
        return {"damping": next(iter(dampings.values()))}
    return {
        "damping": weighted / max(1, sum(sizes.values())),
        "damping_minimum": min(dampings.values()),
        "damping_maximum": max(dampings.values()),
    }
