"""The inverse of low rank: the eigenvectors of largest eigenvalue, from a Krylov space."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from attrs import asdict, define, evolve, field, frozen, validators
from torch import Tensor

from dattri_core import (
    BlockSpec,
    Damping,
    Inverse,
    LinearMap,
    MemoryBudgetError,
    NumericsError,
    Operator,
    Rows,
    Space,
    SpecError,
    as_damping,
    format_bytes,
    free_bytes,
    kept,
)
from dattri_parts.solvers.estimates import mean_eigenvalue
from dattri_parts.solvers.factor import precision_of, require_regular
from dattri_parts.solvers.krylov import RitzPairs, krylov, ritz_pairs

Complement = Literal["drop", "keep"]


@frozen
class Arnoldi:
    """V (L + damping I)^-1 V^T g, with L the k eigenvalues of H of largest magnitude, of any sign.

    Eigenvalues and vectors are Ritz pairs of one Krylov space of H over the whole train set, built
    when the method is fitted: as many products as ``iterations``, one vector each. After that no
    row and no damping costs a product. The part of a row that is orthogonal to V is dropped, as
    published; ``complement="keep"`` takes H to be zero there: plus (g - V V^T g) / damping.

    With ``reduced`` rows of both sides become k numbers, V^T g for train rows and
    (L + damping I)^-1 V^T h for test rows: the same inner products at k numbers a row. Norms and
    cosines are then those of the k numbers.

    Source: Schioppa et al. 2022, Scaling Up Influence Functions, section 4 (arXiv 2112.03052);
    Lanczos with full reorthogonalisation is Arnoldi's method for a symmetric H.

    Args:
        damping: lambda; a number, absolute, or ``{"relative": x}``: x times the mean eigenvalue of
            H, estimated from 32 more products (Hutchinson 1990).
        rank: k, eigenvalues kept; at most the number of parameters.
        iterations: Dimension of the Krylov space; more make the kept pairs exact.
        complement: What becomes of a row outside of the span of V.
        reduced: Whether rows become their k coordinates.
    """

    damping: Damping = field(default=Damping(1e-3), converter=as_damping)
    rank: int = field(default=100, validator=validators.ge(1))
    iterations: int = field(default=200, validator=validators.ge(1))
    complement: Complement = "drop"
    reduced: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"apply"})
    exact: ClassVar[bool] = False

    def out_space(self, space: Space) -> Space:
        """Return the space of k numbers where rows are reduced, else the space itself."""
        return self._coordinates(space) if self.reduced else space

    def check(self, space: Space) -> None:
        """Raise `SpecError` for fields that contradict, `MemoryBudgetError` for a large basis."""
        self._require_consistent()
        self._require_fit(space.dim, 4, free_bytes(torch.device("cpu")), "are free")

    def solve_for(self, operator: Operator, device: torch.device) -> Inverse:
        """Build the Krylov space; nothing after it takes a product with H.

        Raises:
            SpecError: The fields contradict each other.
            MemoryBudgetError: The basis does not fit the operator's memory.
            NumericsError: A product is not finite, or a kept eigenvalue plus damping is zero.
        """
        self._require_consistent()
        space = operator.space
        dtype = torch.promote_types(operator.dtype, torch.float32)
        self._require_fit(space.dim, dtype.itemsize, operator.memory, "may be used")

        def apply(vectors: Tensor) -> Tensor:
            given = Rows.from_flat(space, vectors.to(operator.dtype), torch.arange(len(vectors)))
            return operator.apply(given).flat()

        steps = min(self.iterations, space.dim)
        rank = min(self.rank, steps)

        def build() -> dict[str, Tensor]:
            built = krylov(apply, space.dim, steps, dtype=dtype, device=device)
            return asdict(ritz_pairs(built, rank), recurse=False)

        size = {"iterations": steps, "rank": rank}
        pairs = RitzPairs(**kept(operator, "arnoldi", size, build))
        fitted = _Spectrum(operator, self._coordinates(space), pairs, steps)
        return _inverse(self, fitted, self.damping)

    def _require_consistent(self) -> None:
        if self.rank > self.iterations:
            raise SpecError(
                f"solver 'arnoldi': rank {self.rank} of a Krylov space of {self.iterations} "
                "dimensions; give at least as many iterations, better twice as many"
            )
        if self.reduced and self.complement == "keep":
            raise SpecError(
                "solver 'arnoldi': reduced rows have no part outside of the span; give "
                "complement='drop' with reduced=True, or reduced=False"
            )

    def _coordinates(self, space: Space) -> Space:
        return Space((BlockSpec("krylov", "dense", (min(self.rank, space.dim),)),))

    def _require_fit(self, size: int, itemsize: int, available: int, what: str) -> None:
        needed = (min(self.iterations, size) + min(self.rank, size)) * size * itemsize
        if needed > available:
            raise MemoryBudgetError(
                f"solver 'arnoldi': {self.iterations} vectors of {size} parameters and the "
                f"{self.rank} that are kept need {format_bytes(needed)}, {format_bytes(available)} "
                f"{what}; give fewer iterations and a lower rank, a projector, or fewer parameters "
                "(parameters=...)"
            )


@define(eq=False)
class _Spectrum:
    """The kept pairs of one operator; serves any number of dampings."""

    operator: Operator
    coordinates: Space
    pairs: RitzPairs
    steps: int
    mean_eigenvalue: float | None = None

    def absolute(self, damping: Damping) -> float:
        """Return the damping in the unit of H."""
        if damping.relative and self.mean_eigenvalue is None:
            found = kept(self.operator, "mean-eigenvalue", {}, self._estimate)
            self.mean_eigenvalue = float(found["mean"])
        return damping.absolute(self.mean_eigenvalue or 0.0)

    def _estimate(self) -> dict[str, Tensor]:
        mean = mean_eigenvalue(self.operator, self.pairs.vectors.device)
        return {"mean": torch.tensor(mean, dtype=torch.float64)}

    def basis(self) -> Rows:
        """Return V as k rows."""
        vectors = self.pairs.vectors
        return Rows.from_flat(self.operator.space, vectors, torch.arange(len(vectors)))


def _inverse(solver: Arnoldi, spectrum: _Spectrum, damping: Damping) -> _LowRankInverse:
    value = spectrum.absolute(damping)
    pairs = spectrum.pairs
    shifted = pairs.values + value
    sizes = shifted.abs()
    precision = precision_of(spectrum.operator)
    require_regular(float(sizes.min()), float(sizes.max()), precision, value)
    if solver.complement == "keep" and value == 0:
        raise NumericsError(
            "solver 'arnoldi': complement='keep' divides what is outside of the span by the "
            "damping, which is 0; give a damping, or complement='drop'"
        )
    negative = int((shifted < 0).sum())
    largest = float(pairs.values.abs()[0])
    stats = {
        "damping": value,
        "iterations": float(spectrum.steps),
        "rank": float(len(shifted)),
        "largest_eigenvalue": float(pairs.values[0]),
        "last_eigenvalue": float(pairs.values[-1]),
        "ritz_residual": float(pairs.bounds.max()) / largest if largest else 0.0,
        "negative_eigenvalues": float(negative),
    }
    if negative:
        warnings.warn(
            f"solver 'arnoldi': {negative} of the {len(shifted)} kept eigenvalues stay negative "
            f"with damping {value:.3g} (the smallest is {float(pairs.values.min()):.3g} before "
            "damping); the inverse turns these directions around; give more damping or the "
            "curvature 'ggn'",
            RuntimeWarning,
            stacklevel=3,
        )
    return _LowRankInverse(solver, spectrum, _Coordinates(spectrum), value, stats)


@frozen(eq=False)
class _Coordinates:
    """g -> V^T g: the k inner products of a row with the kept eigenvectors."""

    spectrum: _Spectrum
    blockwise: ClassVar[bool] = False

    @property
    def out_space(self) -> Space:
        return self.spectrum.coordinates

    def map(self, rows: Rows) -> Rows:
        return Rows.from_flat(
            self.out_space, self.of(rows).to(_real(rows.dtype)), rows.index, rows.aux
        )

    def adjoint(self, rows: Rows) -> Rows:
        vectors = self.spectrum.pairs.vectors
        flat = rows.flat().to(vectors.dtype) @ vectors
        return Rows.from_flat(
            self.spectrum.operator.space, flat.to(rows.dtype), rows.index, rows.aux
        )

    def of(self, rows: Rows) -> Tensor:
        """Return the coordinates in the precision of V, ``[B, k]``; factors are not formed."""
        basis = self.spectrum.basis()
        return rows.to(dtype=basis.dtype).inner(basis)


@frozen(eq=False)
class _LowRankInverse:
    solver: Arnoldi
    spectrum: _Spectrum
    coordinates: _Coordinates
    damping: float
    stats: Mapping[str, float]
    blockwise: ClassVar[bool] = False

    @property
    def held(self) -> int:
        """Return the bytes of V."""
        return self.spectrum.pairs.vectors.nbytes

    @property
    def train_map(self) -> LinearMap | None:
        """Return V^T where rows are reduced: the same map at any damping."""
        return self.coordinates if self.solver.reduced else None

    def apply(self, rows: Rows) -> Rows:
        """Return V (L + damping I)^-1 V^T g for every row g, or its coordinates in V."""
        self.spectrum.operator.space.require_same(rows.space, "inverse Hessian")
        if self.solver.reduced:
            return self.in_basis(self.coordinates.map(rows))
        inside = self.coordinates.of(rows)
        shifted = (self.spectrum.pairs.values + self.damping).to(inside.dtype)
        vectors = self.spectrum.pairs.vectors
        if self.solver.complement == "drop":
            flat = (inside / shifted) @ vectors
        else:
            flat = (inside * (1 / shifted - 1 / self.damping)) @ vectors
            flat += rows.flat().to(vectors.dtype) / self.damping
        return Rows.from_flat(rows.space, flat.to(rows.dtype), rows.index, rows.aux)

    def in_basis(self, rows: Rows) -> Rows:
        """Return (L + damping I)^-1 k for rows k = V^T g."""
        values = self.spectrum.pairs.values
        flat = rows.flat().to(values.dtype) / (values + self.damping)
        return Rows.from_flat(rows.space, flat.to(rows.dtype), rows.index, rows.aux)

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping: no product, and the same map of train rows."""
        changed = _inverse(self.solver, self.spectrum, damping)
        return evolve(changed, coordinates=self.coordinates)


def _real(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision: k numbers cost nothing."""
    return torch.promote_types(dtype, torch.float32)
