"""The exact inverse of a curvature made of rows, on the smaller side of Woodbury's identity."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from dattri_core import (
    Block,
    Damping,
    IndexedRows,
    Inverse,
    NumericsError,
    Outlook,
    Rows,
    RowsOperator,
    Space,
    as_damping,
)
from dattri_parts.solvers.dual import Dual
from dattri_parts.solvers.forecast import Forecast, refusal
from dattri_parts.solvers.held import absolute_dampings, damping_stats, groups_of
from dattri_parts.solvers.primal import Primal
from dattri_parts.solvers.reading import Reading
from dattri_parts.solvers.reread import BESIDE, Reread

_log = logging.getLogger("dattri")
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

    Rows that do not fit the memory are not held (``stats["rows_held"]`` is 0): the Gram matrix adds
    up over tiles of rows, one of which is held while those after it stream past, so that k tiles
    read every row (k + 1) / 2 times; 16 m^2 bytes are kept. Answers are then formed, by four more
    readings of the train set for each group of queries (two where the model is in float64). The
    same numbers up to rounding, whatever the memory; a plan says which way it is and what it takes.

    Args:
        damping: lambda; a number, absolute, or ``{"relative": x}``: x times the mean eigenvalue,
            of each block where H is block diagonal. Not 0 where rows are fewer than parameters.
    """

    damping: Damping = field(default=Damping(1e-3), converter=as_damping)
    needs: ClassVar[frozenset[str]] = frozenset({"rows"})
    exact: ClassVar[bool] = True
    forms: ClassVar[bool] = False

    def check(self, space: Space) -> None:
        """Accept any space: what is held depends on the number of rows."""

    def solve_for(self, operator: RowsOperator, device: torch.device) -> Inverse:
        """Read the rows, and factorise their Gram matrix or their second moment.

        Raises:
            MemoryBudgetError: Not even the matrices fit the operator's memory, or rows do not and
                cannot be read by example.
            NumericsError: H + damping I is singular to the operator's precision.
        """
        return _State.of(operator, device).inverse(self.damping)

    def foresee(self, operator: RowsOperator, told: Outlook) -> Outlook:
        """Return what is known before the fit, from the rows of a few examples.

        Raises:
            MemoryBudgetError: The rows will not fit; says why and what would.
        """
        if not isinstance(operator, IndexedRows):
            return told
        forecast = _forecast(operator)
        note = f"woodbury          {forecast.way}"
        told = evolve(told, held=forecast.held, note=note)
        if forecast.fits:
            return evolve(told, forms=not forecast.base, base=forecast.base)
        dual = not any(group.primal(forecast.rows) for group in forecast.groups)
        known = dual and bool(getattr(operator, "own", False))
        return evolve(told, forms=True, blockwise=False, beside=BESIDE, leverages=known)


def _forecast(operator: IndexedRows) -> Forecast:
    forecast = Forecast.of(operator)
    if not forecast.possible:
        raise refusal(str(forecast))
    return forecast


@define(eq=False)
class _State:
    """What does not depend on the damping."""

    operator: RowsOperator
    sides: Mapping[str, Dual | Primal]
    reread: Reread | None = None  # where rows are not held
    asked: int = 0

    @staticmethod
    def of(operator: RowsOperator, device: torch.device) -> _State:
        forecast = _forecast(operator) if isinstance(operator, IndexedRows) else None
        if forecast is None or forecast.fits:
            reading = Reading.of(operator, device)
            if not reading.lacking:
                return _State(operator, reading.sides())
            if forecast is None or not forecast.streams:
                raise refusal(reading.lacking)
            del reading  # with the rows that it holds
        assert isinstance(operator, IndexedRows)
        _log.info("solver 'woodbury': %s", forecast.way)
        reread = Reread.of(operator, device, forecast)
        return _State(operator, reread.sides, reread)

    @property
    def blockwise(self) -> bool:
        """Return whether an answer's block needs that of the row alone, and no reading of rows."""
        return self.operator.blockwise and (self.reread is None or not self.reread.names)

    @property
    def base(self) -> int:
        """Return of how many held rows of H an answer is a combination."""
        duals = (side for side in self.sides.values() if isinstance(side, Dual) and side.blocks)
        return max((side.rows for side in duals), default=0)

    @property
    def leverages(self) -> bool:
        """Return whether the rows are those of the train set, and none of them was left out."""
        operator = self.operator
        if not (isinstance(operator, IndexedRows) and getattr(operator, "own", False)):
            return False
        sides = self.sides.values()
        return all(isinstance(s, Dual) and s.rows == operator.n_train for s in sides)

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
            "rows_held": float(self.reread is None),
            **({} if self.reread is None else {"tiles": float(self.reread.tiles)}),
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
        return self.state.blockwise

    @property
    def forms(self) -> bool:
        """Return whether every block of an answer is formed."""
        return not self.base

    @property
    def base(self) -> int:
        """Return of how many rows of H an answer is a combination."""
        return self.state.base

    @property
    def held(self) -> int:
        """Return the bytes of rows and factors that are kept."""
        return sum(side.nbytes for side in self.state.sides.values())

    @property
    def leverages(self) -> bool:
        """Return whether H is made of the rows of the train set, each of them in its place."""
        return self.state.leverages

    def self_influence(self) -> Tensor:
        """Return <g, (H + damping I)^-1 g> of every train row g, ``[n_train]``.

        It is the leverage of g over w, where K = G G^T + damping/w I has it: no row is read.
        """
        parts = (
            side.self_influence(self.dampings[group], spectral=self.spectral)
            for group, side in self.state.sides.items()
            if isinstance(side, Dual)
        )
        return torch.stack(list(parts)).sum(0)

    @property
    def beside(self) -> int:
        """Return how many formed rows are alive beside an answer while it is made."""
        return 3 if self.state.reread is None else BESIDE

    def apply(self, rows: Rows) -> Rows:
        """Return (H + damping I)^-1 g for every row g, unformed on the side of inner products.

        Where rows are not held it is formed, by readings of them. Where H is block diagonal the
        rows may hold a part of the blocks.
        """
        operator, reread = self.state.operator, self.state.reread
        wanted = operator.space.select(rows.space.names) if self.blockwise else operator.space
        wanted.require_same(rows.space, "inverse Hessian")
        blocks: dict[str, Block] = {}
        if reread is not None:
            blocks |= reread.invert(rows, self.dampings, spectral=self.spectral)
        for group, names in groups_of(operator).items():
            if names[0] in wanted and names[0] not in blocks:
                side, damping = self.state.sides[group], self.dampings[group]
                blocks |= side.invert(rows, names, damping, spectral=self.spectral)
        return Rows(rows.space, blocks, rows.index, rows.aux)

    def apply_each(self, rows: Rows, inverses: Sequence[Inverse]) -> list[Rows]:
        """Return what the inverse at several dampings makes of the rows.

        Where eigenvectors are at hand the rows meet those of H once, and what comes out lies in the
        span of the same eigenvectors for all dampings, so that train rows meet them once as well.
        """
        mine = [one for one in inverses if isinstance(one, _WoodburyInverse)]
        if self.state.reread is not None or not any(one.spectral for one in mine):
            return [one.apply(rows) for one in inverses]
        blocks: list[dict[str, Block]] = [{} for _ in mine]
        for group, names in groups_of(self.state.operator).items():
            if names[0] in rows.space:
                dampings = [one.dampings[group] for one in mine]
                each = self.state.sides[group].invert_each(rows, names, dampings)
                for found, of_group in zip(blocks, each, strict=True):
                    found |= of_group
        return [Rows(rows.space, found, rows.index, rows.aux) for found in blocks]

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping: a new factor, no pass over the data."""
        return self.state.inverse(damping)
