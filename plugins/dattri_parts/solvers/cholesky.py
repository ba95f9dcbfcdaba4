"""The explicit inverse: the whole curvature matrix, factorised in float64."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from attrs import define, field, frozen
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from dattri_core import (
    Damping,
    DenseOperator,
    Inverse,
    MemoryBudgetError,
    NumericsError,
    Rows,
    Space,
    as_damping,
    format_bytes,
    free_bytes,
)
from dattri_parts.solvers.factor import (
    Spectrum,
    Triangular,
    mirror,
    precision_of,
    require_regular,
    spectrum,
    triangular,
)


@frozen
class Cholesky:
    """(H + damping I)^-1 g from the dense H in float64, exact up to rounding.

    A Cholesky factor where H + damping I is positive definite; otherwise the eigenvalues mu of H
    and the exact inverse, which divides by mu + damping whatever its sign (a warning says so).
    Needs 16 d^2 bytes for d parameters, half of them for another damping where the CPU holds the
    matrix, and is refused when they are not free. Parameters whose curvature is exactly zero
    (weights of inputs that are always zero) are split off and divided by damping.

    Args:
        damping: lambda; a number, absolute, or ``{"relative": x}``: x times the mean eigenvalue.
    """

    damping: Damping = field(default=Damping(1e-3), converter=as_damping)
    needs: ClassVar[frozenset[str]] = frozenset({"dense"})
    exact: ClassVar[bool] = True

    def check(self, space: Space) -> None:
        """Raise `MemoryBudgetError` when the matrix and its factor do not fit what is free."""
        _require_fit(space.dim, free_bytes(torch.device("cpu")), "are free")

    def solve_for(self, operator: DenseOperator, device: torch.device) -> Inverse:
        """Write the operator down and factorise it.

        Raises:
            MemoryBudgetError: The matrix and its factor do not fit the operator's memory.
            NumericsError: H + damping I is singular to the operator's precision.
        """
        _require_fit(operator.space.dim, operator.memory, "may be used")
        return _inverse(_Matrix.of(operator, device), self.damping)

    def root_for(self, operator: DenseOperator, device: torch.device) -> Inverse:
        """Write the operator down and decompose it, for (H + damping I)^-1/2.

        Raises:
            MemoryBudgetError: The matrix and its eigenvectors do not fit the operator's memory.
            NumericsError: H + damping I is singular, or has an eigenvalue below zero.
        """
        _require_fit(operator.space.dim, operator.memory, "may be used")
        return _root(_Matrix.of(operator, device), self.damping)


def _require_fit(size: int, available: int, what: str) -> None:
    needed = 2 * 8 * size**2
    if needed > available:
        raise MemoryBudgetError(
            f"solver 'cholesky': the curvature of {size} parameters is a {size} x {size} matrix; "
            f"it and its factor need {format_bytes(needed)}, {format_bytes(available)} {what}; use "
            "the solver 'cg' (method 'if-cg'), a projector, or fewer parameters (parameters=...)"
        )


@runtime_checkable
class _LiveOperator(Protocol):
    """An operator that writes itself down without its rows of zeros, and keeps nothing of it."""

    def live_dense(self) -> tuple[Tensor, Tensor]:
        """Return the coordinates ``[k]`` of the other rows, and H among them, ``[k, k]``."""
        ...


@define(eq=False)
class _Matrix:
    """H without the coordinates of its zero rows; kept, so that a new damping costs no data.

    On the CPU the first factor shares the memory of a matrix that is not an operator's own: above
    the diagonal there is always H.
    """

    space: Space
    live: Tensor  # [d], coordinates whose row is not zero
    values: Tensor  # [live, live]
    mean_eigenvalue: float
    precision: float
    own: bool  # no operator holds it
    spectrum: Spectrum | None = None
    diagonal: Tensor | None = None  # of H, once a factor has the place of the lower triangle

    def factorised(self, damping: float) -> Triangular | None:
        """Return the factor of H + damping I, or None when it is not positive definite."""
        if self.values.device.type != "cpu" or not self.own:
            return triangular(self.values, damping)
        if self.diagonal is not None:
            return triangular(self.whole(), damping, over=True)
        self.diagonal = self.values.diagonal().clone()
        found = triangular(self.values, damping, over=True)
        if found is None:
            mirror(self.values, self.diagonal)
            self.diagonal = None
        return found

    def whole(self) -> Tensor:
        """Return H, a copy where a factor has the place of a part of it."""
        if self.diagonal is None:
            return self.values
        values = self.values.clone()
        mirror(values, self.diagonal)
        return values

    def decomposed(self, damping: float) -> Spectrum:
        """Return the eigenvalues and eigenvectors, computed once for any number of dampings."""
        if self.spectrum is None:
            self.spectrum = spectrum(self.whole(), damping)
        return Spectrum(self.spectrum.values, self.spectrum.basis, damping)

    @staticmethod
    def of(operator: DenseOperator, device: torch.device) -> _Matrix:
        own = isinstance(operator, _LiveOperator)
        if isinstance(operator, _LiveOperator):
            live, matrix = (part.to(device) for part in operator.live_dense())
        else:
            matrix = operator.dense().to(device)
            live = torch.arange(len(matrix), device=device)
        total = float(matrix.diagonal().sum())
        if not math.isfinite(total):
            raise NumericsError("solver 'cholesky': the diagonal of the curvature is not finite")
        # One read of the matrix: times a random vector only a row of zeros gives exactly zero.
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(len(matrix), dtype=matrix.dtype, generator=generator)
        kept = (matrix @ probe.to(device)).nonzero().squeeze(1)
        if len(kept) < len(matrix):
            live, matrix, own = live[kept], matrix[kept[:, None], kept], True
        own = own and matrix.is_contiguous() and matrix.dtype == torch.float64  # as LAPACK wants it
        size = operator.space.dim
        precision = precision_of(operator)
        return _Matrix(operator.space, live, matrix, total / max(1, size), precision, own)


def _inverse(matrix: _Matrix, damping: Damping) -> _DenseInverse:
    value = damping.absolute(matrix.mean_eigenvalue)
    factor: Triangular | Spectrum | None = None
    if len(matrix.live):
        factor = None if matrix.spectrum else matrix.factorised(value)
        if factor is None:
            factor = matrix.decomposed(value)
    stats = _checked(matrix, factor, value)
    if stats["negative_eigenvalues"]:
        warnings.warn(
            f"solver 'cholesky': {stats['negative_eigenvalues']:.0f} of {matrix.space.dim} "
            f"eigenvalues of the curvature stay negative with damping {value:.3g} (the smallest is "
            f"{stats['minimum_eigenvalue']:.3g} before damping); the exact inverse is used, which "
            "turns these directions around; give more damping or the curvature 'ggn'",
            RuntimeWarning,
            stacklevel=3,
        )
    return _DenseInverse(matrix, factor, value, stats)


def _root(matrix: _Matrix, damping: Damping) -> _DenseRoot:
    value = damping.absolute(matrix.mean_eigenvalue)
    factor = matrix.decomposed(value) if len(matrix.live) else None
    stats = _checked(matrix, factor, value)
    if stats["negative_eigenvalues"]:
        raise NumericsError(
            f"solver 'cholesky': (H + damping I)^-1/2 does not exist: "
            f"{stats['negative_eigenvalues']:.0f} of {matrix.space.dim} eigenvalues of the "
            f"curvature stay negative with damping {value:.3g} (the smallest is "
            f"{stats['minimum_eigenvalue']:.3g} before damping); give a damping above "
            f"{-stats['minimum_eigenvalue']:.3g}, the curvature 'ggn', or form='one-sided'"
        )
    return _DenseRoot(matrix, factor, value, stats)


def _checked(
    matrix: _Matrix, factor: Triangular | Spectrum | None, damping: float
) -> dict[str, float]:
    """Return the facts about a factor; raise `NumericsError` when H + damping I is singular."""
    idle = matrix.space.dim - len(matrix.live)
    stats: dict[str, float] = {
        "damping": damping,
        "dimension": float(matrix.space.dim),
        "zero_rows": float(idle),
    }
    if factor is not None:
        least = min(factor.least, damping) if idle else factor.least
        require_regular(least, factor.greatest, matrix.precision, damping)
        stats["condition"] = factor.greatest / least
    elif idle:
        require_regular(damping, damping, 0.0, damping)
    negative = 0
    if isinstance(factor, Spectrum):
        negative = int((factor.shifted < 0).sum())
        stats["minimum_eigenvalue"] = float(factor.values[0])
    stats["negative_eigenvalues"] = float(negative)
    return stats


@frozen(eq=False)
class _DenseInverse:
    """A factor of H + damping I."""

    matrix: _Matrix
    factor: Triangular | Spectrum | None
    damping: float
    stats: Mapping[str, float]
    blockwise: ClassVar[bool] = False

    @property
    def held(self) -> int:
        """Return the bytes of the matrix and of what was made of it."""
        return _held(self.matrix, self.factor)

    def apply(self, rows: Rows) -> Rows:
        """Return (H + damping I)^-1 g for every row g, in the rows' dtype."""
        solve = None if self.factor is None else self.factor.solve
        return _apply(self.matrix, rows, solve, self.damping)

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping: a new factor, no pass over the data."""
        return _inverse(self.matrix, damping)


@frozen(eq=False)
class _DenseRoot:
    """The eigenvectors and eigenvalues of H + damping I."""

    matrix: _Matrix
    factor: Spectrum | None
    damping: float
    stats: Mapping[str, float]
    blockwise: ClassVar[bool] = False

    @property
    def held(self) -> int:
        """Return the bytes of the matrix and of what was made of it."""
        return _held(self.matrix, self.factor)

    def apply(self, rows: Rows) -> Rows:
        """Return (H + damping I)^-1/2 g for every row g, in the rows' dtype."""
        root = None if self.factor is None else self.factor.root
        return _apply(self.matrix, rows, root, self.damping**0.5)

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the root at another damping, from the same eigenvectors."""
        return _root(self.matrix, damping)


def _held(matrix: _Matrix, factor: Triangular | Spectrum | None) -> int:
    kept = [matrix.values, matrix.live]
    if isinstance(factor, Triangular) and factor.lower is not matrix.values:
        kept.append(factor.lower)
    if matrix.spectrum is not None:
        kept += [matrix.spectrum.basis, matrix.spectrum.values]
    return sum(values.nbytes for values in kept)


def _apply(
    matrix: _Matrix, rows: Rows, function: Callable[[Tensor], Tensor] | None, divisor: float
) -> Rows:
    """Return a function of the live coordinates; the others are divided by what damping makes."""
    matrix.space.require_same(rows.space, "inverse Hessian")
    flat = rows.flat()
    vectors = flat.to(matrix.values.device, torch.float64)
    live = matrix.live.to(vectors.device)
    if function is None:
        answer = vectors / divisor
    elif len(live) == matrix.space.dim:
        answer = function(vectors)
    else:
        # Divided by zero only where no damping and no row of H acts; `require_regular` refused.
        answer = vectors / divisor
        answer[:, live] = function(vectors[:, live])
    return Rows.from_flat(rows.space, answer.to(flat), rows.index, rows.aux)
