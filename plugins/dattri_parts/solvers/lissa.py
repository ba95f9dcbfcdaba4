"""LiSSA: the inverse as a series of products, on samples of the train set or on all of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from attrs import define, evolve, field, frozen, validators
from torch import Tensor

from dattri_core import (
    ConvergenceWarning,
    Damping,
    Inverse,
    Rows,
    Space,
    SpecError,
    as_damping,
    reused_rows,
)
from dattri_parts.solvers.estimates import mean_eigenvalue
from dattri_parts.solvers.krylov import largest_eigenvalue
from dattri_parts.solvers.neumann import PROBED, NeumannSeries
from dattri_parts.solvers.pencil import largest_relative_eigenvalue

MARGIN = 1.1
"""Scale over the largest eigenvalue that is found; the series converges from 1/2 on."""
FAR = 0.1
"""Relative residual from which on it is warned about."""


@frozen
class LiSSA:
    """(H + damping I)^-1 g as the limit of v <- g + (I - (H + damping I) / s) v, divided by s.

    The Neumann series of the inverse (Agarwal et al. 2017, arXiv 1602.03943, section 3), with H in
    each step the mean over ``batch`` train examples drawn anew, and the mean taken over ``repeats``
    runs; all rows go through the same draws in the same passes. The draws are keyed by the seed of
    the method, the repeat and the step, so that no result depends on batches, memory, or which
    rows are asked for together. With ``batch=None`` every step takes the whole train set and the
    limit is the exact inverse; else its mean is, up to the noise of the draws.

    The scale s divides H and damping alike, so the limit does not depend on it: the series needs s
    above half the largest eigenvalue of every sample, and gets slower in proportion to s. After t
    steps a direction of eigenvalue mu is solved to (1 - (mu + damping) / s)^t. A negative
    eigenvalue of H + damping I, or an s that is too small, makes it diverge: an error, as soon as
    it shows. Only where s was estimated, and some samples turn out to have larger eigenvalues, a
    row that diverges is summed again, alone, at twice the scale. Koh and Liang 2017, section 3
    (arXiv 1703.04730) use the series for influence functions.

    With a preconditioner M, positive definite and near to (H + damping I)^-1, the series is
    v <- g + (I - (H + damping I) M / s) v and the answer M v / s: the limit is the same, s counts
    eigenvalues of M (H + damping I), which a good M brings near to 1, and a direction is solved to
    (1 - mu / s)^t for such an eigenvalue mu. With an EK-FAC as M this is the series of Wang et al.
    2025, Better Training Data Attribution via Better Inverse Hessian-Vector Products
    (arXiv 2507.14740).

    Args:
        damping: lambda; a number, absolute, or ``{"relative": x}``: x times the mean eigenvalue of
            H, estimated from 32 more products (Hutchinson 1990).
        depth: Steps of the series.
        repeats: Runs whose mean is taken.
        batch: Train examples of a step, drawn with replacement; None for the whole train set.
        scale: s, or None for 1.1 times (the largest eigenvalue of H, or of 4 samples, + damping),
            estimated from short Krylov spaces, and at most 64 times that where a row needs it; with
            M, for 1.1 times the largest eigenvalue of M (H + damping I) likewise.
    """

    damping: Damping = field(default=Damping(1e-3), converter=as_damping)
    depth: int = field(default=1000, validator=validators.ge(1))
    repeats: int = field(default=1, validator=validators.ge(1))
    batch: int | None = field(default=32)
    scale: float | None = field(default=None)
    exact: ClassVar[bool] = False

    def __attrs_post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise SpecError(f"solver 'lissa': batch {self.batch}, expected 1 or more, or None")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise SpecError(f"solver 'lissa': scale {self.scale}, expected a positive number")

    @property
    def needs(self) -> frozenset[str]:
        """Return what it asks of the operator: products, on samples or on the whole train set."""
        return frozenset({"apply"}) if self.batch is None else frozenset({"apply", "sampled"})

    def check(self, space: Space) -> None:
        """Raise `SpecError` for repeats without samples; accept any space."""
        if self.batch is None and self.repeats > 1:
            raise SpecError(
                f"solver 'lissa': {self.repeats} repeats on the whole train set are {self.repeats} "
                "times the same; give batch=, or repeats=1"
            )

    def solve_for(self, operator: Any, device: torch.device) -> Inverse:
        """Return the inverse; the work is done when it is applied."""
        return _LiSSAInverse(self, operator, device, self.damping)

    def precondition(self, operator: Any, device: torch.device, inverse: Inverse) -> Inverse:
        """Return the inverse whose series goes by M, an inverse fitted on the same problem."""
        return _LiSSAInverse(self, operator, device, self.damping, inverse)


@define(eq=False)
class _LiSSAInverse:
    """Sums the series for the rows that it is given; ``stats`` tells of the last ones."""

    solver: LiSSA
    operator: Any
    device: torch.device
    damping: Damping
    preconditioner: Inverse | None = None
    mean_eigenvalue: float | None = None
    largest_eigenvalue: float | None = None  # of H; with a preconditioner, of M (H + damping I)
    stats: Mapping[str, float] = field(factory=dict)
    blockwise: ClassVar[bool] = False

    def apply(self, rows: Rows) -> Rows:
        """Return the series for every row g, in the rows' dtype."""
        self.operator.space.require_same(rows.space, "inverse Hessian")
        damping = self._damping()
        series = self._series(damping, self._scale(damping))
        group = self._group(rows)
        parts = [rows.take(slice(i, i + group)) for i in range(0, max(1, len(rows)), group)]
        answers = Rows.concatenate([series.sum(part) for part in parts])
        self.stats = series.stats
        if series.residual is not None and series.residual > FAR:
            warnings.warn(
                f"solver 'lissa': after {self.solver.depth} steps the largest relative residual is "
                f"{series.residual:.2g}; give more depth, more damping, or the solver 'cg'",
                ConvergenceWarning,
                stacklevel=2,
            )
        if series.widened:
            warnings.warn(
                f"solver 'lissa': {series.widened} of {len(rows)} rows diverged at the estimated "
                f"scale {series.scale:.3g}, since some samples have larger eigenvalues, and were "
                f"summed again at up to {series.widest:.3g}: more slowly to the same limit; give "
                "scale= to sum all alike, or a larger batch",
                ConvergenceWarning,
                stacklevel=2,
            )
        return answers

    def _group(self, rows: Rows) -> int:
        """Return how many rows to sum at once: a step makes a product, so that its memory counts.

        On a processor a tensor beyond what the allocator keeps is new memory at every step; where
        some rows stay below, a fifth of the time of cheap samples was saved.
        """
        size = max(4, torch.empty((), dtype=rows.dtype).element_size())
        # The row, the sum, its product, and what the product needs beside itself; with M also what
        # a step adds, M times the sum before and after it, and their difference.
        copies = 6 if self.preconditioner is None else 10
        most = int(self.operator.memory) // max(1, copies * rows.space.dim * size)
        group = max(1, min(most, len(rows)))
        if self.device.type != "cpu":
            return group
        largest = max((spec.size for spec in rows.space), default=1) * size
        return reused_rows(largest, group)

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping; what was learnt of H stays."""
        largest = self.largest_eigenvalue if self.preconditioner is None else None
        return evolve(self, damping=damping, largest_eigenvalue=largest, stats={})

    def _series(self, damping: float, scale: float) -> NeumannSeries:
        solver = self.solver
        return NeumannSeries(
            self.operator,
            self.device,
            solver.depth,
            solver.repeats,
            solver.batch,
            damping,
            scale,
            widens=solver.batch is not None and solver.scale is None,
            preconditioner=self.preconditioner,
        )

    def _damping(self) -> float:
        if self.damping.relative and self.mean_eigenvalue is None:
            self.mean_eigenvalue = mean_eigenvalue(self.operator, self.device)
        return self.damping.absolute(self.mean_eigenvalue or 0.0)

    def _scale(self, damping: float) -> float:
        if self.solver.scale is not None:
            return self.solver.scale
        if self.largest_eigenvalue is None:
            probed = 1 if self.solver.batch is None else PROBED
            self.largest_eigenvalue = max(self._largest_of(s, damping) for s in range(probed))
        more = damping if self.preconditioner is None else 0.0  # else it is in the eigenvalue
        # A curvature of zero needs any scale at all.
        return MARGIN * (self.largest_eigenvalue + more) or 1.0

    def _largest_of(self, step: int, damping: float) -> float:
        """Return the largest eigenvalue of the sample of one step; see `largest_eigenvalue`."""
        series = self._series(damping, 1.0)
        space, near = self.operator.space, self.preconditioner
        dtype = torch.promote_types(self.operator.dtype, torch.float32)

        def apply(vectors: Tensor) -> Tensor:
            return series.product(as_rows(vectors), 0, step).flat().to(dtype)

        def as_rows(vectors: Tensor) -> Rows:
            return Rows.from_flat(space, vectors, torch.arange(len(vectors)))

        if near is None:
            return largest_eigenvalue(apply, space.dim, dtype=dtype, device=self.device)
        return largest_relative_eigenvalue(
            lambda vectors: torch.add(apply(vectors), vectors, alpha=damping),
            lambda vectors: near.apply(as_rows(vectors)).flat().to(dtype),
            space.dim,
            dtype=dtype,
            device=self.device,
        )
