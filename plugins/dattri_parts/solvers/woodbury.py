"""The exact inverse of a curvature made of rows, from inner products of rows alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
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
    SpanBlock,
    SumBlock,
    as_damping,
    format_bytes,
)
from dattri_parts.solvers.factor import largest_eigenvalue, require_regular
from dattri_parts.solvers.held import absolute_dampings, gram, groups_of, hold, without_negligible

FACTORS = 8
"""Dampings that are solved by a Cholesky factor each before eigenvectors serve all others."""
SMALL = 1500
"""Rows up to which eigenvectors are computed for the second damping: about a second."""
ROUNDING = 1e-2
"""Share of |g| |h| / damping that a score may lose to rounding without a warning."""


@frozen
class Woodbury:
    """(H + damping I)^-1 h from the Gram matrix of the rows of H, exact up to rounding.

    With H = w G^T G for m rows G (w = 1 / n for a mean),

        (H + damping I)^-1 h = (h - G^T (G G^T + damping/w I)^-1 G h) / damping

    (Woodbury 1950; Henderson and Searle 1981). Only inner products of rows are taken, so that
    factored rows stay factored: no matrix of the size of the parameters squared and no vector of
    the size of the parameters is made. An answer is kept as h and a combination of the rows of H.
    Where H is block diagonal each block has a Gram matrix of its own.

    It takes m (m + 1) / 2 inner products and a factorisation of m^3 / 3 multiply-adds in float64,
    and holds the rows of H, the Gram matrix in the dtype of the rows and its factor: about 12 m^2
    bytes for float32. The first dampings have a Cholesky factor each; from the ninth (the second
    where m <= 1500), eigenvectors are computed once, after which another damping costs nothing.
    A score is exact to the rounding of |g| |h| / damping: with damping far below the largest
    eigenvalue, use ``model.double()``; ``stats["rounding"]`` is that error, relative.

    Args:
        damping: lambda; a number, absolute, or ``{"relative": x}``: x times the mean eigenvalue,
            of each block where H is block diagonal. Not 0: the rows span no more than m directions.
    """

    damping: Damping = field(default=Damping(1e-3), converter=as_damping)  # type: ignore[misc]
    needs: ClassVar[frozenset[str]] = frozenset({"rows"})
    exact: ClassVar[bool] = True

    def check(self, space: Space) -> None:
        """Accept any space: what is held depends on the number of rows."""

    def solve_for(self, operator: RowsOperator, device: torch.device) -> Inverse:
        """Read the rows, compute their Gram matrices and factorise them.

        Raises:
            MemoryBudgetError: Rows, Gram matrices and factors do not fit the operator's memory.
            NumericsError: H + damping I is singular to the operator's precision.
        """
        dual = _Dual.of(operator, device)
        return dual.inverse(self.damping, spectral=False)


@define(eq=False)
class _Gram:
    """G G^T of some blocks; one factor is held at a time."""

    names: tuple[str, ...]
    size: int  # numbers of a row
    matrix: Tensor  # [m, m], in the dtype of the rows' sums
    trace: float
    largest: float  # eigenvalue
    shift: float | None = None  # of the factor
    lower: Tensor | None = None  # [m, m], float64
    spectrum: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def of(rows: Rows, names: tuple[str, ...]) -> _Gram:
        matrix = gram([rows.blocks[name] for name in names])
        trace = float(matrix.diagonal().double().sum())
        largest = 0.0
        if trace > 0:
            largest = largest_eigenvalue(lambda v: matrix @ v, matrix)
        size = sum(rows.space[name].size for name in names)
        return _Gram(names, size, matrix, trace, largest)

    def solve(self, vectors: Tensor, shift: float, *, spectral: bool) -> Tensor:
        """Return (G G^T + shift I)^-1 v for every column v, ``[m, C]`` in float64."""
        if spectral:
            values, basis = self._eigenvectors()
            return basis @ ((basis.mT @ vectors) / (values + shift).unsqueeze(1))
        if self.shift != shift or self.lower is None:
            self.lower = None  # the one before goes first
            self.lower, self.shift = _cholesky(self.matrix, shift), shift
        return torch.cholesky_solve(vectors, self.lower)

    def _eigenvectors(self) -> tuple[Tensor, Tensor]:
        if self.spectrum is None:
            self.lower = self.shift = None
            values, basis = torch.linalg.eigh(self.matrix.double())
            self.spectrum = values.clamp_min(0), basis  # a Gram matrix: below zero is rounding
        return self.spectrum


@define(eq=False)
class _Dual:
    """What does not depend on the damping: the rows and their Gram matrices."""

    rows: Rows
    grams: dict[str, _Gram]
    weight: float
    blockwise: bool
    space: Space
    precision: float
    negligible: int  # rows that were left out
    asked: int = 0

    @staticmethod
    def of(operator: RowsOperator, device: torch.device) -> _Dual:
        groups = groups_of(operator)
        item = operator.dtype.itemsize

        def fits(count: int, size: int) -> bool:
            matrices = len(groups) * (item + 8) * count**2
            if matrices + size > operator.memory:
                raise _too_large(count, size, matrices, operator.memory, len(groups))
            return True

        rows = hold(operator, device, fits)
        assert rows is not None
        read, precision = len(rows), torch.finfo(operator.dtype).eps
        rows = without_negligible(rows, groups, precision)
        grams = {name: _Gram.of(rows, names) for name, names in groups.items()}
        if not all(torch.isfinite(torch.tensor(g.trace)) for g in grams.values()):
            raise NumericsError(
                "solver 'woodbury': squares of the curvature's rows are not finite; look for a "
                "diverged checkpoint"
            )
        return _Dual(
            rows=rows,
            grams=grams,
            weight=operator.weight,
            blockwise=operator.blockwise,
            space=operator.space,
            precision=precision,
            negligible=read - len(rows),
        )

    def inverse(self, damping: Damping, *, spectral: bool) -> _WoodburyInverse:
        self.asked += 1
        traces = {name: self.weight * g.trace for name, g in self.grams.items()}
        sizes = {name: g.size for name, g in self.grams.items()}
        dampings = absolute_dampings(damping, traces, sizes)
        rounding = 0.0
        for name, g in self.grams.items():
            greatest = self.weight * g.largest + dampings[name]
            require_regular(dampings[name], greatest, self.precision, dampings[name])
            rounding = max(rounding, self.precision * greatest / dampings[name])
        if rounding > ROUNDING:
            warnings.warn(
                f"solver 'woodbury': damping is so far below the largest eigenvalue that scores "
                f"may be off by {rounding:.1g} of |g| |h| / damping; use model.double(), more "
                "damping, or the solver 'cg'",
                RuntimeWarning,
                stacklevel=3,
            )
        count = len(self.rows)
        stats = {
            "damping": max(dampings.values()),
            "least_damping": min(dampings.values()),
            "rows": float(count),
            "negligible_rows": float(self.negligible),
            "row_bytes": float(self.rows.nbytes),
            "gram_bytes": float(sum(g.matrix.nbytes for g in self.grams.values())),
            "rounding": rounding,
        }
        return _WoodburyInverse(self, dampings, spectral, stats)


@frozen(eq=False)
class _WoodburyInverse:
    """One damping."""

    dual: _Dual
    dampings: Mapping[str, float]
    spectral: bool
    stats: Mapping[str, float]

    @property
    def blockwise(self) -> bool:
        """Return whether H is block diagonal."""
        return self.dual.blockwise

    def apply(self, rows: Rows) -> Rows:
        """Return (H + damping I)^-1 g for every row g, as g and a combination of the rows of H.

        Where H is block diagonal the rows may hold a part of the blocks.
        """
        space = self.dual.space
        wanted = space.select(rows.space.names) if self.blockwise else space
        wanted.require_same(rows.space, "inverse Hessian")
        base = self.dual.rows
        blocks: dict[str, Block] = {}
        for group, g in self.dual.grams.items():
            names = [name for name in g.names if name in wanted]
            if not names:
                continue
            damping = self.dampings[group]
            met = torch.zeros(len(base), len(rows), dtype=torch.float64, device=g.matrix.device)
            for name in names:
                own = rows.blocks[name].to(base.blocks[name].device, base.dtype)
                met += base.blocks[name].inner(own)
            solved = g.solve(met, damping / self.dual.weight, spectral=self.spectral)
            coefficients = solved.mT.div_(-damping).to(g.matrix.dtype)
            for name in names:
                block = rows.blocks[name]
                span = SpanBlock(coefficients, base.blocks[name]).to(block.device, block.dtype)
                scale = torch.full((len(rows),), 1 / damping, dtype=torch.float64)
                blocks[name] = SumBlock((block.scale(scale), span))
        return Rows(rows.space, blocks, rows.index, rows.aux)

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping: a new factor, no pass over the data."""
        many = self.dual.asked >= (1 if len(self.dual.rows) <= SMALL else FACTORS)
        return self.dual.inverse(damping, spectral=many)


def _cholesky(matrix: Tensor, shift: float) -> Tensor:
    """Return L with L L^T = matrix + shift I, in float64."""
    lower = matrix.to(torch.float64, copy=True).mT  # in the layout of LAPACK: factorised in place
    lower.diagonal().add_(shift)
    failed = torch.zeros((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if int(failed):
        raise NumericsError(
            f"solver 'woodbury': the Gram matrix of {len(matrix)} rows plus {shift:.3g} is not "
            "positive definite to the precision of its entries; give more damping, or use "
            "model.double()"
        )
    return lower


def _too_large(count: int, size: int, matrices: int, memory: int, groups: int) -> MemoryBudgetError:
    each = f"{groups} Gram matrices" if groups > 1 else "a Gram matrix"
    return MemoryBudgetError(
        f"solver 'woodbury': the first {count} rows of the curvature take {format_bytes(size)}, "
        f"and {each} of {count} x {count} with {'their factors' if groups > 1 else 'its factor'} "
        f"{format_bytes(matrices)}; {format_bytes(memory)} may be used; give a larger memory=, a "
        "curvature with fewer rows ('fisher' has one an example, 'ggn' one for each output), a "
        "projector, or the solver 'cg', 'datainf' or a spectral curvature"
    )
