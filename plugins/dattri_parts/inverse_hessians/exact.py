"""The exact inverse of a curvature, by the route that its size allows."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from attrs import evolve, field, frozen, validators

from dattri_core import (
    ByUse,
    Curvature,
    CurvatureInverse,
    Damping,
    Inverse,
    Outlook,
    Problem,
    Rows,
    Solver,
    Space,
    as_damping,
    format_bytes,
)
from dattri_parts.curvatures.ggn import GGN
from dattri_parts.curvatures.hessian import Hessian
from dattri_parts.solvers.cholesky import Cholesky
from dattri_parts.solvers.spectral import Spectral
from dattri_parts.solvers.woodbury import Woodbury

_log = logging.getLogger("dattri")


@frozen
class Exact:
    """(H + damping I)^-1 g, exact up to rounding, at any number of parameters.

    A curvature that is a sum of squares (GGN, Fisher) is inverted from its rows, on the smaller
    side of Woodbury's identity; one with known eigenvectors (K-FAC) by those. The Hessian is
    neither: it is written down and factorised, 16 d^2 bytes for d parameters. Above ``largest``
    parameters that cannot be, and the GGN takes its place: the same matrix where outputs are linear
    in the parameters or residuals are zero, and otherwise without the part that can make the
    Hessian indefinite. Whether that happens depends on the number of parameters alone, never on the
    memory of a machine, and is told by a warning in the log, by ``stats["substituted"]`` and by the
    plan of a dry run.

    Args:
        curvature: H.
        damping: lambda; a number, absolute, or ``{"relative": x}``: x times the mean eigenvalue.
        substitute: What takes the place of a curvature that is only known as a matrix.
        largest: Parameters up to which a matrix is written down; 16384 take 4 GiB.
    """

    curvature: Curvature = field(factory=Hessian)
    damping: Damping = field(default=Damping(1e-3), converter=as_damping)  # type: ignore[misc]
    substitute: Curvature = field(factory=GGN)
    largest: int = field(default=16384, validator=validators.ge(0))

    @property
    def needs(self) -> frozenset[str]:
        """Return what the curvature asks of the problem."""
        asked = frozenset({"rows"})
        if isinstance(self.curvature, ByUse):
            return self.curvature.needs_for(asked)
        return self.curvature.needs

    @property
    def exact(self) -> bool:
        """Return whether the curvature is the one that it is named after."""
        return self.curvature.exact

    def outlook(self, space: Space) -> Outlook:
        """Return what is known before the fit, and which curvature will be inverted."""
        return evolve(self.route(space).outlook(space), note=self.told(space))

    def check(self, space: Space) -> None:
        """Raise `SpecError` when a curvature does not take the space."""
        self.route(space).check(space)

    def fit(self, problem: Problem) -> Inverse:
        """Fit on the route that the number of parameters allows.

        Raises:
            SpecError: The substitute needs a loss or a source that gives its rows.
            MemoryBudgetError: The matrix, or the rows and their factor, do not fit the memory.
        """
        route = self.route(problem.space)
        inverse = route.fit(problem)
        if route.curvature == self.curvature:
            return inverse
        _log.warning("%s", self.told(problem.space))
        return _Substituted(inverse)

    def route(self, space: Space) -> CurvatureInverse:
        """Return the curvature that is inverted in a space, with its solver."""
        solver = self._solver(self.curvature, space)
        if isinstance(solver, Cholesky) and space.dim > self.largest:
            return CurvatureInverse(self.substitute, self._solver(self.substitute, space))
        return CurvatureInverse(self.curvature, solver)

    def told(self, space: Space) -> str:
        """Return one line that says which curvature is inverted in a space, and how."""
        route = self.route(space)
        names = [type(part).__name__ for part in (route.curvature, route.solver)]
        if route.curvature == self.curvature:
            return f"inverse Hessian   {names[0]} of {space.dim} parameters by {names[1]}"
        return (
            f"inverse Hessian: the {type(self.curvature).__name__} of {space.dim} parameters is a "
            f"matrix of {format_bytes(8 * space.dim**2)} and no sum of squares; the {names[0]} "
            f"takes its place, inverted exactly by {names[1]} (largest={self.largest}; for the "
            f"{type(self.curvature).__name__} itself use the solver 'cg')"
        )

    def _solver(self, curvature: Curvature, space: Space) -> Solver:
        given = curvature.gives(space)
        if "rows" in given:
            return Woodbury(self.damping)
        return Spectral(self.damping) if "spectral" in given else Cholesky(self.damping)


@frozen(eq=False)
class _Substituted:
    """The inverse of the curvature that took another's place."""

    inverse: Inverse

    @property
    def stats(self) -> Mapping[str, float]:
        """Return those of the inverse, and that it is of the substitute."""
        return {**self.inverse.stats, "substituted": 1.0}

    @property
    def blockwise(self) -> bool:
        """Return whether the substitute is block diagonal."""
        return self.inverse.blockwise

    def apply(self, rows: Rows) -> Rows:
        """Return (H + damping I)^-1 g for every row g, H the substitute."""
        return self.inverse.apply(rows)

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping."""
        return _Substituted(self.inverse.with_damping(damping))
