"""Conjugate gradients for many right-hand sides at once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import define, evolve, field, frozen, validators
from typing_extensions import Protocol, runtime_checkable

from dattri_core import (
    ConvergenceWarning,
    Damping,
    Inverse,
    Operator,
    Rows,
    Space,
    as_damping,
)
from dattri_parts.solvers.columns import Columns
from dattri_parts.solvers.estimates import mean_eigenvalue
from dattri_parts.solvers.factor import precision_of

NEGLIGIBLE = 1.0
"""Eigenvalues of a preconditioner, in units of its damping, that are not worth their rotation."""


@runtime_checkable
class _Leading(Protocol):
    """An inverse that has one near to it, of less work."""

    def leading(self, share: float) -> Inverse:
        """Return it; eigenvalues up to a share of the damping may count as zero."""
        ...


@frozen
class CG:
    """(H + damping I)^-1 g by conjugate gradients (Hestenes and Stiefel 1952), from products only.

    Every row g is a system of its own with its own step sizes; all share one product with H, a pass
    over the train set, per iteration. A row stops when |g - (H + damping I) x| <= tolerance |g|, by
    the residual of the recurrence, and leaves the work. Where a direction p has negative curvature,
    p^T (H + damping I) p <= 0, the row keeps its last iterate, and g itself when that happens at
    the first step, as in truncated Newton methods (Steihaug 1983; Nocedal and Wright 2006,
    algorithm 7.1). A row that is zero stays zero. Rows that miss the tolerance, or that meet
    negative curvature, are counted in ``stats`` and warned about; so is a damping below what the
    products of a model in mixed precision are rounded to.

    With a preconditioner M, positive definite and near to (H + damping I)^-1, directions come from
    M r (Nocedal and Wright 2006, algorithm 5.3). Residual, tolerance and the answer stay those of
    the system itself; at negative curvature in the first step the row keeps M g. Of a spectral M
    the directions whose curvature is below its damping are taken to have none.

    Peers stop after 10 iterations or so; that is far from the inverse when the curvature is
    ill-conditioned. The defaults go on to a relative residual of 1e-5, at most 100 products.

    Args:
        damping: lambda; a number, absolute, or ``{"relative": x}``: x times the mean eigenvalue,
            estimated from 32 more products (Hutchinson 1990).
        maximum_iterations: Products with H at most.
        tolerance: Relative residual at which a row stops; 0 runs all iterations.
    """

    damping: Damping = field(default=Damping(1e-3), converter=as_damping)
    maximum_iterations: int = field(default=100, validator=validators.ge(1))
    tolerance: float = field(default=1e-5, validator=validators.ge(0.0))
    needs: ClassVar[frozenset[str]] = frozenset({"apply"})
    exact: ClassVar[bool] = True

    def check(self, space: Space) -> None:
        """Accept any space."""

    def solve_for(self, operator: Operator, device: torch.device) -> Inverse:
        """Return the inverse; the work is done when it is applied."""
        return _CGInverse(self, operator, self.damping)

    def precondition(self, operator: Operator, device: torch.device, inverse: Inverse) -> Inverse:
        """Return the inverse that goes along M r, M an inverse fitted on the same problem."""
        near = inverse.leading(NEGLIGIBLE) if isinstance(inverse, _Leading) else inverse
        return _CGInverse(self, operator, self.damping, near)


@define(eq=False)
class _CGInverse:
    """Solves for the rows that it is given; ``stats`` tells of the last ones."""

    solver: CG
    operator: Operator
    damping: Damping
    preconditioner: Inverse | None = None
    mean_eigenvalue: float | None = None
    stats: Mapping[str, float] = field(factory=dict)
    blockwise: ClassVar[bool] = False

    def apply(self, rows: Rows) -> Rows:
        """Return (H + damping I)^-1 g for every row g, in the rows' dtype."""
        self.operator.space.require_same(rows.space, "inverse Hessian")
        damping = self._damping(rows.device)
        group = self._group(rows)
        outcomes: list[_Outcome] = []
        answers: list[Rows] = []
        for first in range(0, max(1, len(rows)), group):
            part = rows.take(slice(first, first + group))
            answer, outcome = self._solve(part, damping)
            answers.append(answer)
            outcomes.append(outcome)
        self.stats = _summary(outcomes, damping)
        self._warn()
        self._warn_of_rounding(max((o.reach for o in outcomes), default=0.0), damping)
        return Rows.concatenate(answers)

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping."""
        return evolve(self, damping=damping, stats={})

    def _solve(self, rows: Rows, damping: float) -> tuple[Rows, _Outcome]:
        columns = Columns.start(rows, self.solver.tolerance, self.preconditioner)
        iterations = 0
        while iterations < self.solver.maximum_iterations and columns.working:
            # The product is not named, so that it is freed before the next one is made.
            columns.step(
                self.operator.apply(columns.directions(self.operator.dtype)),
                damping,
                first=iterations == 0,
            )
            iterations += 1
        outcome = _Outcome(
            iterations,
            columns.residual,
            columns.converged,
            columns.negative,
            len(rows),
            float(columns.reach.max()) if len(rows) else 0.0,
        )
        return columns.answer(rows), outcome

    def _damping(self, device: torch.device) -> float:
        if self.damping.relative and self.mean_eigenvalue is None:
            self.mean_eigenvalue = mean_eigenvalue(self.operator, device)
        return self.damping.absolute(self.mean_eigenvalue or 0.0)

    def _group(self, rows: Rows) -> int:
        # Answer, residual, direction, product, and what the product needs beside itself.
        each = 6 * rows.space.dim * max(4, torch.empty((), dtype=rows.dtype).element_size())
        return max(1, min(max(1, len(rows)), self.operator.memory // max(1, each)))

    def _warn(self) -> None:
        negative, total = int(self.stats["negative_curvature"]), int(self.stats["rows"])
        missed = total - int(self.stats["converged"]) - negative
        if negative:
            warnings.warn(
                f"solver 'cg': {negative} of {total} rows met negative curvature with damping "
                f"{self.stats['damping']:.3g} and kept their last iterate; give more damping or "
                "the curvature 'ggn'",
                ConvergenceWarning,
                stacklevel=3,
            )
        if missed:
            warnings.warn(
                f"solver 'cg': {missed} of {total} rows did not reach the tolerance "
                f"{self.solver.tolerance:.1g} in {int(self.stats['iterations'])} iterations "
                f"(largest relative residual {self.stats['residual']:.2g}); give more "
                "maximum_iterations or more damping",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _warn_of_rounding(self, reach: float, damping: float) -> None:
        """Warn where a model computes in fewer digits than its rows have, and it shows."""
        precision = precision_of(self.operator)
        if precision <= torch.finfo(self.operator.dtype).eps or damping > precision * reach:
            return
        warnings.warn(
            f"solver 'cg': the damping {damping:.3g} is below what the products of this model are "
            f"rounded to, {precision:.1g} of eigenvalues up to {reach:.3g}: along directions of "
            f"little curvature answers are rounding; give a damping above {precision * reach:.1g}, "
            "or model.double() for more precision",
            ConvergenceWarning,
            stacklevel=4,
        )


@frozen
class _Outcome:
    iterations: int
    residual: float
    converged: int
    negative: int
    rows: int
    reach: float


def _summary(outcomes: list[_Outcome], damping: float) -> dict[str, float]:
    return {
        "damping": damping,
        "iterations": float(max((o.iterations for o in outcomes), default=0)),
        "residual": max((o.residual for o in outcomes), default=0.0),
        "converged": float(sum(o.converged for o in outcomes)),
        "negative_curvature": float(sum(o.negative for o in outcomes)),
        "rows": float(sum(o.rows for o in outcomes)),
    }
