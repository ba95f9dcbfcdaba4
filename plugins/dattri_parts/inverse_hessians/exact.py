"""The exact inverse of a curvature, by the route that its size allows."""

from __future__ import annotations

import logging

from attrs import evolve, field, frozen, validators

from dattri_core import (
    ByUse,
    Curvature,
    CurvatureInverse,
    Damping,
    IndexedRows,
    Inverse,
    MemoryBudgetError,
    Outlook,
    Problem,
    Solver,
    Space,
    SpecError,
    as_damping,
    format_bytes,
)
from dattri_parts.curvatures.fisher_information import Fisher
from dattri_parts.curvatures.ggn import GGN
from dattri_parts.curvatures.hessian import Hessian
from dattri_parts.inverse_hessians.substituted import Substituted
from dattri_parts.solvers.cholesky import Cholesky
from dattri_parts.solvers.forecast import Forecast
from dattri_parts.solvers.spectral import Spectral
from dattri_parts.solvers.woodbury import Woodbury

_log = logging.getLogger("dattri")


@frozen
class Exact:
    """(H + damping I)^-1 g, exact up to rounding, at any number of parameters.

    A curvature that is a sum of squares (GGN, Fisher) is inverted from its rows, on the smaller
    side of Woodbury's identity; one with known eigenvectors (K-FAC) by those. The Hessian is
    neither: it is written down and factorised, 16 d^2 bytes for d parameters. Above ``largest``
    parameters that cannot be, which depends on their number alone, and never on the memory of a
    machine. What takes its place is the first of two whose Gram matrix of rows fits the memory:

    - the GGN, one row for each output of each of the n examples: the same matrix where outputs are
      linear in the parameters or residuals are zero, and otherwise without the part that can make
      the Hessian indefinite;
    - the empirical Fisher matrix 1/n sum_i g_i g_i^T, one row an example, also where the loss does
      not give outputs and criterion apart: another matrix, near the Hessian only where the model is
      near the distribution of the labels (Kunstner et al. 2019, arXiv 1905.12558).

    m rows take 16 m^2 bytes, and those of the rows as factors where these are held: rows that do
    not fit are read again, more often the less memory there is. How many there are is known before
    the fit, from the first 8 examples. Which curvature is inverted, and by how many readings and
    multiply-adds, is told by a warning in the log and by the plan of a dry run;
    ``stats["substituted"]`` is 1 for the first of the two, 2 for the second. Where not even the
    second fits, the refusal says what would.

    Args:
        curvature: H. One that is a sum of squares whose rows are too many gives way to the
            fallback.
        damping: lambda; a number, absolute, or ``{"relative": x}``: x times the mean eigenvalue.
        substitute: What takes the place of a curvature that is only known as a matrix.
        fallback: What takes the place of the substitute where its rows are too many for the
            memory, or the loss or the source cannot give them. For a classifier 'leading-ggn' is
            nearer to the GGN with as many rows; the default serves any loss.
        largest: Parameters up to which a matrix is written down; 16384 take 4 GiB.
    """

    curvature: Curvature = field(factory=Hessian)
    damping: Damping = field(default=Damping(1e-3), converter=as_damping)
    substitute: Curvature = field(factory=GGN)
    fallback: Curvature = field(factory=lambda: Fisher(kind="empirical"))
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
        """Return what is known of the inverse before the fit; the fallback is like the substitute.

        Which of the two it is takes the train set to tell: `foresee`.
        """
        return self._first(space).outlook(space)

    def foresee(self, problem: Problem) -> Outlook:
        """Return what is known of the inverse before the fit: of the curvature of `route`.

        Raises:
            SpecError, MemoryBudgetError: As of `route`.
        """
        route = self.route(problem)
        return evolve(route.stage.foresee(problem), note=route.note)

    def check(self, space: Space) -> None:
        """Raise `SpecError` when a curvature does not take the space."""
        self._first(space).check(space)

    def fit(self, problem: Problem) -> Inverse:
        """Fit the curvature of `route`.

        Raises:
            SpecError: The loss or the source gives neither substitute's rows.
            MemoryBudgetError: The matrix, or the rows and their factor, do not fit the memory.
        """
        route = self.route(problem)
        if route.place:
            _log.warning("%s", route.note)
        inverse = route.stage.fit(problem)
        return Substituted(inverse, route.place) if route.place else inverse

    def route(self, problem: Problem) -> Route:
        """Return the curvature that is inverted of a problem, with its solver.

        Reads the rows of a few examples at most.

        Raises:
            MemoryBudgetError: The rows of no substitute fit the memory.
            SpecError: The loss or the source does not give the rows of the fallback.
        """
        space = problem.space
        stage = self._first(space)
        own = stage.curvature is self.curvature
        way, why = _ways(stage, problem)
        if not why:
            told = f"inverse Hessian   {_way(stage, space)}" if own else self._told(stage, space)
            return Route(stage, 0 if own else 1, told + way)
        last = self._with(self.fallback, space)
        forecast = _forecast(last, problem)
        if forecast is not None and not forecast.possible:
            beaten = f"{_called(stage.curvature)} cannot {'be' if own else 'take its place'}"
            raise MemoryBudgetError(
                f"{self._matrix(space)}; the {beaten}{' inverted by its rows' if own else ''} "
                f"({why}), nor the {_called(self.fallback)} ({forecast}); give a larger memory=, "
                "fewer train examples, a projector, or, without an exact inverse, the solver 'cg' "
                "or a spectral curvature (method 'if-ekfac')"
            )
        way = f": {forecast.way}" if forecast is not None else ""
        note = f"{self._told(last, space)}{way}; not the {_called(stage.curvature)}: {why}"
        return Route(last, 2, note)

    def _first(self, space: Space) -> CurvatureInverse:
        """Return the curvature itself, or its substitute where the matrix is too large."""
        own = self._with(self.curvature, space)
        if isinstance(own.solver, Cholesky) and space.dim > self.largest:
            return self._with(self.substitute, space)
        return own

    def _with(self, curvature: Curvature, space: Space) -> CurvatureInverse:
        given = curvature.gives(space)
        solver: Solver = Cholesky(self.damping)
        if "rows" in given:
            solver = Woodbury(self.damping)
        elif "spectral" in given:
            solver = Spectral(self.damping)
        return CurvatureInverse(curvature, solver)

    def _matrix(self, space: Space) -> str:
        matrix = (
            f"inverse Hessian: the {_called(self.curvature)} of {space.dim} parameters is a matrix "
            f"of {format_bytes(8 * space.dim**2)}"
        )
        if "rows" in self.curvature.gives(space):
            return f"{matrix}, and its rows are too many"
        return f"{matrix} and no sum of squares (largest={self.largest})"

    def _told(self, stage: CurvatureInverse, space: Space) -> str:
        return (
            f"{self._matrix(space)}; the {_called(stage.curvature)} takes its place, inverted "
            f"exactly by {_called(stage.solver)} (for the {_called(self.curvature)} itself use the "
            "solver 'cg')"
        )


@frozen
class Route:
    """A curvature and its solver.

    Args:
        stage: Both.
        place: 0: the curvature that was asked for; 1: its substitute; 2: the fallback.
        note: One line that says so.
    """

    stage: CurvatureInverse
    place: int
    note: str


def _forecast(stage: CurvatureInverse, problem: Problem) -> Forecast | None:
    """Return what its rows will take, None where it is not inverted from rows of examples."""
    if not isinstance(stage.solver, Woodbury):
        return None
    operator = stage.curvature.fit(problem)
    return Forecast.of(operator) if isinstance(operator, IndexedRows) else None


def _ways(stage: CurvatureInverse, problem: Problem) -> tuple[str, str]:
    """Return what it takes to invert a curvature by its rows, or why that cannot be; else empty."""
    try:
        forecast = _forecast(stage, problem)
    except (SpecError, MemoryBudgetError) as error:  # not even of one example
        return "", str(error)
    if forecast is None:
        return "", ""
    return (f": {forecast.way}", "") if forecast.possible else ("", str(forecast))


def _called(part: object) -> str:
    kind = getattr(part, "kind", None)
    name = type(part).__name__
    return f"{kind} {name}" if isinstance(kind, str) else name


def _way(stage: CurvatureInverse, space: Space) -> str:
    return f"{_called(stage.curvature)} of {space.dim} parameters by {_called(stage.solver)}"
