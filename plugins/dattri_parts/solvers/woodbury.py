"""The exact inverse of a curvature made of rows, on the smaller side of Woodbury's identity."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from attrs import define, field, frozen
from torch import Tensor

from dattri_core import (
    Block,
    Damping,
    Inverse,
    MemoryBudgetError,
    NumericsError,
    Rows,
    RowsOperator,
    Space,
    as_damping,
    concatenate,
    format_bytes,
)
from dattri_parts.solvers.dual import Dual
from dattri_parts.solvers.forecast import PRIMAL
from dattri_parts.solvers.held import absolute_dampings, damping_stats, groups_of, kept
from dattri_parts.solvers.primal import Primal

FACTORS = 8
"""Dampings that are solved by a Cholesky factor each before eigenvectors serve all others."""
SMALL = 1500
"""Rows up to which eigenvectors are computed for the second damping: about a second."""
ROUNDING = 1e-2
"""Relative rounding error from which a warning is given."""


@frozen
class Woodbury:
    """(H + damping I)^-1 h from the rows of H, exact up to rounding.

    With H = w G^T G for m rows G (w = 1 / n for a mean),

        (H + damping I)^-1 h = (h - G^T (G G^T + damping/w I)^-1 G h) / damping

    (Woodbury 1950; Henderson and Searle 1981). The right side needs inner products of rows alone,
    so that factored rows stay factored: no matrix of the size of the parameters squared and no
    vector of the size of the parameters is made, and an answer is kept as h and a combination of
    rows of H. Blocks of a block diagonal H are inverted apart. Where there are 1.5 times more rows
    than numbers in a row (a sketch, a small layer) H itself is less work and is factorised.

    The right side takes m (m + 1) / 2 inner products and a factorisation of m^3 / 3 multiply-adds
    in float64, and holds the rows and a factor of 8 m^2 bytes. Another damping takes no pass over
    the data: a new Gram matrix of the held rows, a small part of the work, and a new factor; from
    the ninth damping on (the second where m <= 1500) eigenvectors are computed once, after which
    others cost nothing. Rows that together are rounding of the largest are left out. A score is
    exact to the rounding of |g| |h| / damping: ``stats["rounding"]`` is that error, relative; with
    damping far below the largest eigenvalue use ``model.double()``.

    Args:
        damping: lambda; a number, absolute, or ``{"relative": x}``: x times the mean eigenvalue,
            of each block where H is block diagonal. Not 0 where rows are fewer than parameters.
    """

    damping: Damping = field(default=Damping(1e-3), converter=as_damping)  # type: ignore[misc]
    needs: ClassVar[frozenset[str]] = frozenset({"rows"})
    exact: ClassVar[bool] = True
    forms: ClassVar[bool] = False

    def check(self, space: Space) -> None:
        """Accept any space: what is held depends on the number of rows."""

    def solve_for(self, operator: RowsOperator, device: torch.device) -> Inverse:
        """Read the rows, and factorise their Gram matrix or their second moment.

        Raises:
            MemoryBudgetError: Rows and factors do not fit the operator's memory.
            NumericsError: H + damping I is singular to the operator's precision.
        """
        state = _State(operator, _Reading.of(operator, device).sides())
        return state.inverse(self.damping)


@define(eq=False)
class _Reading:
    """One pass over the rows: held, or added up where they are more than numbers in a row."""

    operator: RowsOperator
    device: torch.device
    groups: Mapping[str, tuple[str, ...]]
    count: int = 0
    parts: dict[str, list[Block]] = field(factory=dict)  # by block
    moments: dict[str, Tensor] = field(factory=dict)  # by group

    @staticmethod
    def of(operator: RowsOperator, device: torch.device) -> _Reading:
        """Read all rows.

        Raises:
            MemoryBudgetError: They do not fit, whichever side is taken.
        """
        reading = _Reading(operator, device, groups_of(operator))
        for rows in operator.rows():
            reading.add(rows)
        return reading

    def size(self, group: str) -> int:
        """Return the numbers of a row in the blocks of a group."""
        return sum(self.operator.space[name].size for name in self.groups[group])

    def add(self, rows: Rows) -> None:
        """Take some more rows."""
        self.count += len(rows)
        small = kept(rows)
        for group, names in self.groups.items():
            if group not in self.moments and self.count >= PRIMAL * self.size(group):
                self._turn(group)
            if group in self.moments:
                self._accumulate(group, [small.blocks[name] for name in names])
                continue
            for name in names:
                self.parts.setdefault(name, []).append(small.blocks[name])
        self._require_room()

    def sides(self) -> dict[str, Dual | Primal]:
        """Return each group on its smaller side."""
        operator, dtype = self.operator, self.operator.dtype
        found: dict[str, Dual | Primal] = {}
        for group, names in self.groups.items():
            if group in self.moments or not self.count:
                space = operator.space.select(names)
                moment = self.moments.get(group)
                if moment is None:
                    moment = torch.zeros(space.dim, space.dim, dtype=torch.float64)
                found[group] = Primal(space, moment, self.count, dtype)
                continue
            blocks = {name: concatenate(self.parts.pop(name)) for name in names}
            found[group] = Dual.of(blocks, self.size(group), operator.weight, dtype)
        return found

    def _turn(self, group: str) -> None:
        """Add up what was held of a group."""
        size = self.size(group)
        self.moments[group] = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        self._require_room()
        held = [self.parts.pop(name, []) for name in self.groups[group]]
        for blocks in zip(*held, strict=True):
            self._accumulate(group, blocks)

    def _accumulate(self, group: str, blocks: Sequence[Block]) -> None:
        flat = torch.cat([block.flat().double() for block in blocks], dim=1)
        self.moments[group].addmm_(flat.T, flat, alpha=self.operator.weight)

    def _require_room(self) -> None:
        matrices = sum(16 * self.size(group) ** 2 for group in self.moments)
        duals = len(self.groups) - len(self.moments)
        factors = 8 * duals * self.count**2
        rows = sum(block.nbytes for parts in self.parts.values() for block in parts)
        if matrices + factors + rows > self.operator.memory:
            raise MemoryBudgetError(
                f"solver 'woodbury': after {self.count} rows of the curvature, rows take "
                f"{format_bytes(rows)}, Gram matrices of {self.count} x {self.count} "
                f"{format_bytes(factors)} and second moments {format_bytes(matrices)}; "
                f"{format_bytes(self.operator.memory)} may be used; give a larger memory=, a "
                "curvature with fewer rows ('fisher' has one an example, 'ggn' one for each "
                "output), a projector, or the solver 'cg', 'datainf' or a spectral curvature"
            )


@define(eq=False)
class _State:
    """What does not depend on the damping."""

    operator: RowsOperator
    sides: Mapping[str, Dual | Primal]
    asked: int = 0

    def inverse(self, damping: Damping) -> _WoodburyInverse:
        """Return the inverse at a damping; the first one factorises, others when they are used."""
        traces = {name: side.trace for name, side in self.sides.items()}
        sizes = {name: side.size for name, side in self.sides.items()}
        dampings = absolute_dampings(damping, traces, sizes)
        for name, side in self.sides.items():
            if isinstance(side, Dual) and not dampings[name] > 0:
                raise NumericsError(
                    f"solver 'woodbury': the damping is 0, and {side.rows} rows of the curvature "
                    f"span at most {side.rows} of {side.size} directions; give damping > 0"
                )
            if not self.asked:
                side.factorise(dampings[name])
        most = max(min(side.rows, side.size) for side in self.sides.values())
        spectral = self.asked >= (1 if most <= SMALL else FACTORS) and self._has_room()
        self.asked += 1
        return _WoodburyInverse(self, dampings, spectral, self._stats(dampings))

    def _has_room(self) -> bool:
        """Return whether eigenvectors, and what it takes to compute them, fit the memory."""
        held = sum(side.nbytes for side in self.sides.values())
        most = max(min(side.rows, side.size) for side in self.sides.values())
        return held + 24 * most**2 <= self.operator.memory

    def _stats(self, dampings: Mapping[str, float]) -> dict[str, float]:
        sides = self.sides.values()
        rounding = max(side.rounding(dampings[name]) for name, side in self.sides.items())
        if rounding > ROUNDING:
            warnings.warn(
                "solver 'woodbury': the damping is so far below the largest eigenvalue that scores "
                f"may be off by {rounding:.1g} of |g| |h| / damping; use model.double(), more "
                "damping, or the solver 'cg'",
                RuntimeWarning,
                stacklevel=4,
            )
        return {
            **damping_stats(dampings, {name: side.size for name, side in self.sides.items()}),
            "rows": float(max(side.rows for side in sides)),
            "negligible_rows": float(min(side.negligible for side in sides)),
            "dual_blocks": float(sum(isinstance(side, Dual) for side in sides)),
            "row_bytes": float(sum(side.row_bytes for side in sides)),
            "factor_bytes": float(sum(side.nbytes - side.row_bytes for side in sides)),
            "rounding": rounding,
        }


@frozen(eq=False)
class _WoodburyInverse:
    """One damping."""

    state: _State
    dampings: Mapping[str, float]
    spectral: bool
    stats: Mapping[str, float]

    @property
    def blockwise(self) -> bool:
        """Return whether H is block diagonal."""
        return self.state.operator.blockwise

    @property
    def forms(self) -> bool:
        """Return whether every block of an answer is formed."""
        return not self.base

    @property
    def base(self) -> int:
        """Return of how many rows of H an answer is a combination."""
        sides = self.state.sides.values()
        return max((side.rows for side in sides if isinstance(side, Dual)), default=0)

    def apply(self, rows: Rows) -> Rows:
        """Return (H + damping I)^-1 g for every row g, unformed on the side of inner products.

        Where H is block diagonal the rows may hold a part of the blocks.
        """
        operator = self.state.operator
        wanted = operator.space.select(rows.space.names) if self.blockwise else operator.space
        wanted.require_same(rows.space, "inverse Hessian")
        blocks: dict[str, Block] = {}
        for group, names in groups_of(operator).items():
            if names[0] in wanted:
                side, damping = self.state.sides[group], self.dampings[group]
                blocks |= side.invert(rows, names, damping, spectral=self.spectral)
        return Rows(rows.space, blocks, rows.index, rows.aux)

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping: a new factor, no pass over the data."""
        return self.state.inverse(damping)
