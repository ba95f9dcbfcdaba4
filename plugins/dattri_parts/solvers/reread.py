"""Rows of a curvature that are read again whenever they are needed: too many to be held.

Rows stand in one order wherever they meet a Gram matrix: example by example, those of an example as
they come. So it does not matter how a reading is cut, or that each draw of labels is another pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core import (
    Block,
    DenseBlock,
    IndexedRows,
    MemoryBudgetError,
    NumericsError,
    Rows,
    concatenate,
    format_bytes,
)
from dattri_parts.solvers.dual import Dual, gram, require_finite
from dattri_parts.solvers.forecast import Forecast, refusal
from dattri_parts.solvers.held import groups_of, kept
from dattri_parts.solvers.kernel import Kernel
from dattri_parts.solvers.primal import Primal
from dattri_parts.solvers.reading import add_squares

SLACK = 1.25
"""By how much the rows of a tile may exceed what those of the first examples foretold."""
CONTRACTION_SHARE = 4
"""One part in so many of the memory holds rows that are formed to meet others."""

BESIDE = 1
"""Formed rows beside an answer while it is made: what a block of it is about to gain."""


@frozen(eq=False)
class Reread:
    """Gram matrices of rows, and the two readings of all rows that apply the inverse.

    Args:
        operator: Gives the rows.
        names: Blocks of the groups whose rows meet each other.
        sides: What was made of each group.
        tiles: In how many parts the rows were held, one at a time, to meet all others.
    """

    operator: IndexedRows
    names: Mapping[str, tuple[str, ...]]
    sides: Mapping[str, Dual | Primal]
    tiles: int

    @staticmethod
    def of(operator: IndexedRows, device: torch.device, forecast: Forecast) -> Reread:
        """Read the rows in tiles: while one is held, it meets itself and all rows after it.

        With k tiles of one size every row is read (k + 1) / 2 times.

        Raises:
            MemoryBudgetError: The rows of one example do not fit beside the matrices.
            NumericsError: A row is not finite.
        """
        groups, dtype = groups_of(operator), operator.dtype
        sides: dict[str, Dual | Primal] = {}
        duals: dict[str, tuple[str, ...]] = {}
        moments: dict[str, Tensor] = {}
        for (group, names), foretold in zip(groups.items(), forecast.groups, strict=True):
            if foretold.primal(forecast.rows):
                size = foretold.size
                moments[group] = torch.zeros(size, size, dtype=torch.float64, device=device)
            else:
                duals[group] = names
        count = _add_moments(operator, groups, moments)
        for group, moment in moments.items():
            sides[group] = Primal(operator.space.select(groups[group]), moment, count, dtype)
        matrices, tiles = _matrices(operator, duals, forecast, device)
        for group, matrix in matrices.items():
            require_finite(matrix.diagonal(), duals[group])
            trace = operator.weight * float(matrix.diagonal().sum())
            kernel = Kernel(len(matrix), operator.weight, trace, dtype, matrix.clone)
            size = sum(operator.space[name].size for name in duals[group])
            sides[group] = Dual({}, size, kernel, 0)
        return Reread(operator, duals, {group: sides[group] for group in groups}, tiles)

    def invert(
        self, rows: Rows, dampings: Mapping[str, float], *, spectral: bool
    ) -> dict[str, Block]:
        """Return the blocks of the groups that are not `Primal`, formed: the inverse times rows.

        Raises:
            NumericsError: There are not as many rows as at the fit.
        """
        dtype, device = self.operator.dtype, next(iter(rows.blocks.values())).device
        formed = {
            name: rows.blocks[name].dense().values.to(dtype, copy=True)
            for names in self.names.values()
            for name in names
        }
        met, turn = self._meet(formed)
        shares: dict[str, Tensor] = {}
        for group, products in met.items():
            side = self.sides[group]
            assert isinstance(side, Dual)
            if len(products) != side.rows:
                raise NumericsError(
                    f"solver 'woodbury': {len(products)} rows of the curvature, {side.rows} at the "
                    "fit; the model or its data changed, fit again"
                )
            solved = side.kernel.solve(products[turn], dampings[group], spectral=spectral)
            products[turn] = solved  # in the order in which rows come
            shares[group] = products.mT.neg().to(dtype)
        start = 0
        for part in self.operator.rows():
            here, small = slice(start, start + len(part)), kept(part)
            for group, names in self.names.items():
                for name in names:
                    formed[name] += small.blocks[name].combine(shares[group][:, here])
            start += len(part)
        found: dict[str, Block] = {}
        for group, names in self.names.items():
            for name in names:
                answer = formed.pop(name).div_(dampings[group])
                found[name] = DenseBlock(answer.to(device, rows.blocks[name].dtype))
        return found

    def _meet(self, formed: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return all rows' products with vectors by group, ``[m, C]``, and their order."""
        met: dict[str, list[Tensor]] = {group: [] for group in self.names}
        came: list[Tensor] = []
        limit = self.operator.memory // CONTRACTION_SHARE
        for part in self.operator.rows():
            small = kept(part)
            came.append(part.index)
            for group, names in self.names.items():
                vectors = {name: DenseBlock(formed[name]) for name in names}
                met[group].append(_products(small.blocks, vectors, names, limit))
        return {group: torch.cat(parts) for group, parts in met.items()}, by_example(came)


def by_example(came: Sequence[Tensor]) -> Tensor:
    """Return the order that puts rows example by example, those of one as they came."""
    return torch.argsort(torch.cat(list(came)).cpu(), stable=True)


def _products(
    left: Mapping[str, Block], right: Mapping[str, Block], names: Sequence[str], limit: int
) -> Tensor:
    """Return all inner products summed over some blocks, in float64."""
    total: Tensor | None = None
    for name in names:
        part = left[name].inner(right[name], limit=limit)
        total = part.double() if total is None else total.add_(part)
    assert total is not None
    return total


def _add_moments(
    operator: IndexedRows, groups: Mapping[str, tuple[str, ...]], moments: Mapping[str, Tensor]
) -> int:
    """Add up the second moments of some groups by one reading; return how many rows there are."""
    count = 0
    for rows in operator.rows() if moments else ():
        small = kept(rows)
        count += len(rows)
        for group, moment in moments.items():
            blocks = [small.blocks[name] for name in groups[group]]
            add_squares(moment, blocks, operator.weight)
    return count


# --- Gram matrices, a tile at a time --------------------------------------------------------------
def _matrices(
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
            columns[group].append(_products(held, small.blocks, names, limit))
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
