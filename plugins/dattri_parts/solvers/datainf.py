"""DataInf: the mean of the inverses of single rows, in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from dattri_core import (
    Block,
    Damping,
    DenseBlock,
    IndexedRows,
    Inverse,
    NumericsError,
    Outlook,
    Rows,
    RowsOperator,
    Space,
    SpanBlock,
    SumBlock,
    as_damping,
)
from dattri_parts.solvers.forecast import EXAMPLES
from dattri_parts.solvers.held import (
    absolute_dampings,
    damping_stats,
    groups_of,
    kept,
    squares_of,
)
from dattri_parts.solvers.together import joined, own_part

HELD_SHARE = 4
"""Rows are held, not read again for each group of queries, up to one part in so many of memory."""
BESIDE = 1
"""Formed rows alive beside an answer while it is made; a block of it at a time, and so less."""


@frozen
class DataInf:
    """1/N sum_i (r_i r_i^T + damping I)^-1 h, in closed form: no iterations, no factorisation.

    For H = 1/N sum_i r_i r_i^T the inverse of the mean is replaced by the mean of the inverses,
    each by Sherman and Morrison,

        (1/damping) (h - 1/N sum_i r_i <r_i, h> / (damping + |r_i|^2)),

    block by block where H is block diagonal. A bound of the error grows with the squared size of a
    block, so small blocks (LoRA) suit it. One pass over the rows for each group of queries, unless
    they fit a quarter of the memory and stay. Source: Kwon et al. 2024 (arXiv 2310.00902),
    equation 5.

    Args:
        damping: lambda; a number, absolute, or ``{"relative": x}``: x times the mean eigenvalue of
            each block. The default is the paper's, 0.1 / (n d_l) sum_i |r_i|^2 for layer l.
    """

    damping: Damping = field(
        default=Damping(0.1, relative=True),
        converter=as_damping,
    )
    needs: ClassVar[frozenset[str]] = frozenset({"rows"})
    exact: ClassVar[bool] = False

    def check(self, space: Space) -> None:
        """Accept any space."""

    def foresee(self, operator: RowsOperator, told: Outlook) -> Outlook:
        """Return what is known before the fit: from a few examples, whether rows will be held."""
        if not isinstance(operator, IndexedRows):
            return told
        few = [kept(r) for r in operator.rows_of(torch.arange(min(EXAMPLES, operator.n_train)))]
        scale = operator.n_train / EXAMPLES if operator.n_train > EXAMPLES else 1.0
        size = round(scale * sum(rows.nbytes for rows in few))
        count = round(scale * sum(map(len, few)))
        if size <= operator.memory // HELD_SHARE:
            return evolve(told, forms=False, base=count, held=size + 8 * count)
        return evolve(told, blockwise=False, beside=BESIDE)

    def solve_for(self, operator: RowsOperator, device: torch.device) -> Inverse:
        """Read the lengths of all rows, and hold the rows if they are small.

        Raises:
            NumericsError: A block has neither damping nor curvature.
        """
        return _inverse(_Lengths.of(operator, device), self.damping)


@define(eq=False)
class _Lengths:
    """What does not depend on the damping."""

    operator: RowsOperator
    groups: Mapping[str, tuple[str, ...]]
    held: Rows | None
    squares: Mapping[str, Tensor]  # by group, [N] in float64

    @staticmethod
    def of(operator: RowsOperator, device: torch.device) -> _Lengths:
        """Read all rows: their lengths, and the rows themselves while they are small."""
        groups = groups_of(operator)
        found: dict[str, list[Tensor]] = {group: [] for group in groups}
        held: list[Rows] | None = []
        size = 0
        own, processes = own_part(operator)
        for rows in own.rows():
            part = kept(rows)
            for group, names in groups.items():
                found[group].append(squares_of([part.blocks[name] for name in names]))
            if held is not None:
                held.append(part)
                size += part.nbytes
                held = held if size <= operator.memory // HELD_SHARE else None
        if processes is not None:
            found = {group: joined(processes, parts, device) for group, parts in found.items()}
            whole = sum(processes.gathered(size))
            small = all(processes.gathered(held is not None))
            small = small and whole <= operator.memory // HELD_SHARE
            held = joined(processes, held or [], device) if small else None
        nothing = torch.zeros(1, dtype=torch.float64)  # so that a curvature without rows is zero
        squares = {group: torch.cat(parts or [nothing]) for group, parts in found.items()}
        return _Lengths(operator, groups, Rows.concatenate(held) if held else None, squares)

    @property
    def count(self) -> int:
        """Return N."""
        return len(next(iter(self.squares.values())))

    def parts(self) -> Iterator[tuple[slice, Rows]]:
        """Yield rows and where they stand among all."""
        start = 0
        for part in self.operator.rows() if self.held is None else (self.held,):
            yield slice(start, start + len(part)), part
            start += len(part)


def _inverse(lengths: _Lengths, damping: Damping) -> _DataInfInverse:
    operator = lengths.operator
    traces = {group: operator.weight * float(s.sum()) for group, s in lengths.squares.items()}
    names = lengths.groups
    sizes = {group: sum(operator.space[n].size for n in names[group]) for group in names}
    dampings = absolute_dampings(damping, traces, sizes)
    if not all(value > 0 for value in dampings.values()):
        raise NumericsError(
            "solver 'datainf': the damping is 0, and each r r^T + damping I has rank 1; give "
            "damping > 0, or {'relative': 0.1}"
        )
    stats = {
        **damping_stats(dampings, sizes),
        "rows": float(lengths.count),
        "rows_held": float(lengths.held is not None),
    }
    return _DataInfInverse(lengths, dampings, stats)


@frozen(eq=False)
class _DataInfInverse:
    """One damping."""

    lengths: _Lengths
    dampings: Mapping[str, float]
    stats: Mapping[str, float]

    @property
    def blockwise(self) -> bool:
        """Return whether a block of an answer needs that of the row alone, and no pass of its own.

        Rows that are read again are read once for all blocks.
        """
        return self.lengths.operator.blockwise and self.lengths.held is not None

    @property
    def forms(self) -> bool:
        """Return whether answers are formed: where rows are not held."""
        return self.lengths.held is None

    @property
    def base(self) -> int:
        """Return of how many rows of H an answer may be a combination."""
        return 0 if self.lengths.held is None else self.lengths.count

    @property
    def beside(self) -> int:
        """Return how many formed rows are alive beside an answer while it is made."""
        return BESIDE

    @property
    def held(self) -> int:
        """Return the bytes of rows and of their lengths that are kept."""
        rows = 0 if self.lengths.held is None else self.lengths.held.nbytes
        return rows + sum(squares.nbytes for squares in self.lengths.squares.values())

    def apply(self, rows: Rows) -> Rows:
        """Return the mean of the inverses times every row g.

        An answer is formed, or g and a combination of the rows of H where those are held. Where H
        is block diagonal the rows may hold a part of the blocks.
        """
        return self.apply_each(rows, [self])[0]

    def apply_each(self, rows: Rows, inverses: Sequence[Inverse]) -> list[Rows]:
        """Return what the inverse at several dampings makes of the rows: one pass for all."""
        lengths, space = self.lengths, self.lengths.operator.space
        mine = [one for one in inverses if isinstance(one, _DataInfInverse)]
        wanted = space.select(rows.space.names) if lengths.operator.blockwise else space
        wanted.require_same(rows.space, "inverse Hessian")
        found: list[dict[str, Block]] = [{} for _ in mine]
        for where, part in lengths.parts():
            for group, names in lengths.groups.items():
                inside = [name for name in names if name in wanted]
                if not inside:
                    continue
                met = _met(inside, part, rows)
                for one, blocks in zip(mine, found, strict=True):
                    shares = one._shares(group, where, met)
                    for name in inside:
                        span = SpanBlock(shares, part.blocks[name])
                        blocks[name] = _added(blocks.get(name), span) if one.forms else span
        for one, blocks in zip(mine, found, strict=True):
            for group, names in lengths.groups.items():
                scale = torch.full((len(rows),), 1 / one.dampings[group], dtype=torch.float64)
                for name in (name for name in names if name in wanted):
                    blocks[name] = _sum_of(rows.blocks[name].scale(scale), blocks.get(name))
        return [Rows(rows.space, blocks, rows.index, rows.aux) for blocks in found]

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping, from the same lengths of rows."""
        return _inverse(self.lengths, damping)

    def _shares(self, group: str, where: slice, met: Tensor) -> Tensor:
        """Return -w <r_i, g> / (damping (damping + N w |r_i|^2)) for every row g, ``[C, B]``."""
        operator, damping = self.lengths.operator, self.dampings[group]
        lengths = self.lengths.count * operator.weight * self.lengths.squares[group][where]
        divisor = (-damping / operator.weight * (damping + lengths)).unsqueeze(1)
        return (met / divisor).T.to(operator.dtype)


def _met(names: Sequence[str], part: Rows, rows: Rows) -> Tensor:
    """Return the inner products <r_i, g> over some blocks, ``[B, C]`` in float64."""
    met: Tensor | None = None
    for name in names:
        block = part.blocks[name]
        inner = block.inner(rows.blocks[name].to(block.device, block.dtype)).double()
        met = inner if met is None else met.add_(inner)
    assert met is not None
    return met


def _added(before: Block | None, span: SpanBlock) -> DenseBlock:
    """Return the sum of what is formed so far."""
    formed = span.dense()
    return formed if before is None else DenseBlock(before.dense().values.add_(formed.values))


def _sum_of(own: Block, other: Block | None) -> Block:
    if other is None:
        return own
    other = other.to(own.device, own.dtype)
    if isinstance(other, DenseBlock):
        return DenseBlock(own.dense().values + other.values)
    return SumBlock((own, other))
