"""Gram matrices of rows that are too many to be held: a tile of them meets all rows after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import evolve
from torch import Tensor

from dattri_core import Block, IndexedRows, MemoryBudgetError, concatenate, format_bytes
from dattri_parts.solvers.dual import gram
from dattri_parts.solvers.forecast import Forecast, refusal
from dattri_parts.solvers.held import kept

SLACK = 1.25
"""By how much the rows of a tile may exceed what those of the first examples foretold."""
CONTRACTION_SHARE = 4
"""One part in so many of the memory holds rows that are formed to meet others."""


def gram_by_tiles(
    operator: IndexedRows,
    groups: Mapping[str, tuple[str, ...]],
    forecast: Forecast,
    device: torch.device,
) -> tuple[dict[str, Tensor], int]:
    """Return the Gram matrix of each group in float64, ``[m, m]``, and the number of tiles."""
    strips: dict[str, list[Tensor]] = {group: [] for group in groups}  # on and right of a diagonal
    names = [name for part in groups.values() for name in part]
    start, size, tiles = 0, forecast.tile, 0
    while names and start < operator.n_train:
        stop = min(start + size, operator.n_train)
        held = _held(operator, names, range(start, stop), forecast.room)
        if held is None:  # more than foretold
            size = max(1, (stop - start) // 2)
            continue
        if held:
            for group, strip in _strips(operator, groups, held, stop).items():
                strips[group].append(strip)
            tiles += 1
            if tiles == 1:  # now it is known how many rows there are
                forecast = evolve(forecast, rows=strips[next(iter(groups))][0].shape[1])
                if not forecast.streams:
                    raise refusal(
                        f"{forecast.rows} rows, more than the first examples foretold: their "
                        f"matrices take {format_bytes(forecast.matrix_bytes)}, "
                        f"{format_bytes(forecast.available)} may be used"
                    )
        start, held = stop, None  # before the next is read
    return {group: _mirrored(parts, device) for group, parts in strips.items()}, tiles


def _held(
    operator: IndexedRows, names: Sequence[str], examples: range, room: int
) -> dict[str, Block] | None:
    """Return the rows of some examples by block, nothing where there are none.

    None where they are more than the room and half of the examples may be fewer.
    """
    parts: dict[str, list[Block]] = {name: [] for name in names}
    came: list[Tensor] = []
    size = 0
    for rows in operator.rows_of(torch.arange(examples.start, examples.stop)):
        small = kept(rows.select(names))
        size += small.nbytes
        if size > SLACK * room:
            if len(examples) > 1:
                return None
            raise MemoryBudgetError(
                f"solver 'woodbury': the rows of train example {examples.start} take more than "
                f"{format_bytes(size)}, {format_bytes(room)} may be used beside the Gram matrix; "
                "give a larger memory=, or a projector"
            )
        came.append(rows.index)
        for name in names:
            parts[name].append(small.blocks[name])
        del rows, small
    if not came:
        return {}
    order = by_example(came)
    turned = not torch.equal(order, torch.arange(len(order)))
    joined = {name: concatenate(parts.pop(name)) for name in names}
    return {name: block.take(order) if turned else block for name, block in joined.items()}


def _strips(
    operator: IndexedRows,
    groups: Mapping[str, tuple[str, ...]],
    held: Mapping[str, Block],
    stop: int,
) -> dict[str, Tensor]:
    """Return the products of held rows with each other and with all rows after them, by group."""
    limit = operator.memory // CONTRACTION_SHARE
    columns: dict[str, list[Tensor]] = {group: [] for group in groups}
    came: list[Tensor] = []
    for rows in operator.rows_of(torch.arange(stop, operator.n_train)):
        small = kept(rows)
        came.append(rows.index)
        for group, names in groups.items():
            columns[group].append(products_of(held, small.blocks, names, limit))
        del rows, small
    found: dict[str, Tensor] = {}
    for group, names in groups.items():
        own = gram([held[name] for name in names], limit)
        rest = torch.cat(columns.pop(group), dim=1)[:, by_example(came)] if came else own[:, :0]
        found[group] = torch.cat([own, rest], dim=1)
    return found


def _mirrored(strips: list[Tensor], device: torch.device) -> Tensor:
    """Return a symmetric matrix from the parts on and right of its diagonal; empties the list."""
    count = strips[0].shape[1] if strips else 0
    matrix = torch.empty(count, count, dtype=torch.float64, device=device)
    start = 0
    while strips:
        strip = strips.pop(0)
        rows = slice(start, start + len(strip))
        matrix[rows, start:] = strip
        matrix[start:, rows] = strip.mT
        start += len(strip)
    return matrix


def by_example(came: Sequence[Tensor]) -> Tensor:
    """Return the order that puts rows example by example, those of one as they came."""
    return torch.argsort(torch.cat(list(came)).cpu(), stable=True)


def products_of(
    left: Mapping[str, Block], right: Mapping[str, Block], names: Sequence[str], limit: int
) -> Tensor:
    """Return all inner products summed over some blocks, in float64; so each where one side is."""
    total: Tensor | None = None
    for name in names:
        one = left[name].to(None, torch.promote_types(left[name].dtype, right[name].dtype))
        part = one.inner(right[name], limit=limit)
        total = part.double() if total is None else total.add_(part)
    assert total is not None
    return total
