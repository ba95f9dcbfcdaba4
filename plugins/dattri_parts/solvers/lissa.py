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
    DenseBlock,
    Inverse,
    NumericsError,
    Rows,
    Space,
    SpecError,
    as_damping,
)
from dattri_parts.solvers.estimates import mean_eigenvalue
from dattri_parts.solvers.krylov import largest_eigenvalue
from dattri_parts.solvers.rowwise import Named, column, lengths, row_slices, squares

MARGIN = 1.1
"""Scale over the largest eigenvalue that is found; the series converges from 1/2 on."""
PROBED = 4
"""Samples whose largest eigenvalue is estimated."""
CHECK = 10
"""Steps on samples between two looks at the lengths: each waits for the device."""
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
    it shows. Koh and Liang 2017, section 3 (arXiv 1703.04730) use it so for influence functions.

    Args:
        damping: lambda; a number, absolute, or ``{"relative": x}``: x times the mean eigenvalue of
            H, estimated from 32 more products (Hutchinson 1990).
        depth: Steps of the series.
        repeats: Runs whose mean is taken.
        batch: Train examples of a step, drawn with replacement; None for the whole train set.
        scale: s, or None for 1.1 times (the largest eigenvalue of H, or of 4 samples, + damping),
            estimated from short Krylov spaces.
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


@define(eq=False)
class _LiSSAInverse:
    """Sums the series for the rows that it is given; ``stats`` tells of the last ones."""

    solver: LiSSA
    operator: Any
    device: torch.device
    damping: Damping
    mean_eigenvalue: float | None = None
    largest_eigenvalue: float | None = None
    stats: Mapping[str, float] = field(factory=dict)
    blockwise: ClassVar[bool] = False

    def apply(self, rows: Rows) -> Rows:
        """Return the series for every row g, in the rows' dtype."""
        self.operator.space.require_same(rows.space, "inverse Hessian")
        damping = self._damping()
        series = _Series(self.solver, self.operator, self.device, damping, self._scale(damping))
        size = max(4, torch.empty((), dtype=rows.dtype).element_size())
        # The row, the sum, its product, and what the product needs beside itself.
        group = max(1, self.operator.memory // max(1, 6 * rows.space.dim * size))
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
        return answers

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping; what was learnt of H stays."""
        return evolve(self, damping=damping, stats={})

    def _damping(self) -> float:
        if self.damping.relative and self.mean_eigenvalue is None:
            self.mean_eigenvalue = mean_eigenvalue(self.operator, self.device)
        return self.damping.absolute(self.mean_eigenvalue or 0.0)

    def _scale(self, damping: float) -> float:
        if self.solver.scale is not None:
            return self.solver.scale
        if self.largest_eigenvalue is None:
            probed = 1 if self.solver.batch is None else PROBED
            self.largest_eigenvalue = max(self._largest_of(step) for step in range(probed))
        # A curvature of zero needs any scale at all.
        return MARGIN * (self.largest_eigenvalue + damping) or 1.0

    def _largest_of(self, step: int) -> float:
        """Return the largest eigenvalue of the sample of one step."""
        series = _Series(self.solver, self.operator, self.device, 0.0, 1.0)
        space = self.operator.space

        def apply(vectors: Tensor) -> Tensor:
            rows = Rows.from_flat(space, vectors, torch.arange(len(vectors)))
            return series.product(rows, 0, step).flat()

        return largest_eigenvalue(
            apply,
            space.dim,
            dtype=torch.promote_types(self.operator.dtype, torch.float32),
            device=self.device,
        )


@define(eq=False)
class _Series:
    """One operator, damping and scale."""

    solver: LiSSA
    operator: Any
    device: torch.device
    damping: float
    scale: float
    iterations: int = 0
    change: float = 0.0  # |v_t+1 - v_t| / |v_t|, the largest of all rows
    residual: float | None = None  # |g - A x| / |g|, the largest of all rows; on all data only

    @property
    def stats(self) -> dict[str, float]:
        found = {
            "damping": self.damping,
            "scale": self.scale,
            "iterations": float(self.iterations),
            "change": self.change,
        }
        return found if self.residual is None else {**found, "residual": self.residual}

    def sum(self, rows: Rows) -> Rows:
        """Return the mean over repeats of the series."""
        formed = {name: rows.blocks[name].dense().values for name in rows.space.names}
        wide = {n: v.to(torch.promote_types(v.dtype, torch.float32)) for n, v in formed.items()}
        length = lengths(wide)
        if not bool(torch.isfinite(length).all()):
            raise NumericsError("solver 'lissa': a right-hand side is not finite")
        # At unit length no square underflows, however small the gradient of an example is.
        tiny = max(torch.finfo(value.dtype).tiny for value in wide.values())
        length = length.where(length >= tiny, 0.0)
        inverse = (1 / length).where(length > 0, 0.0)
        unit = {name: value * column(inverse, value) for name, value in wide.items()}
        total = self._run(unit, rows, 0)
        for repeat in range(1, self.solver.repeats):
            for name, value in self._run(unit, rows, repeat).items():
                total[name] += value
        scale = length / (self.solver.repeats * self.scale)
        blocks = {
            name: DenseBlock(value.mul_(column(scale, value)).to(rows.dtype))
            for name, value in total.items()
        }
        return Rows(rows.space, blocks, rows.index, rows.aux)

    def product(self, vectors: Rows, repeat: int, step: int) -> Rows:
        """Return H times rows, H of the sample of one step or of the train set."""
        operator, solver = self.operator, self.solver
        given = vectors.to(dtype=operator.dtype)
        answer: Rows
        if solver.batch is None:
            answer = operator.apply(given)
        else:
            generator = operator.random.generator("lissa", repeat, step)
            index = torch.randint(operator.n_train, (solver.batch,), generator=generator)
            answer = operator.apply_on(given, index)
        return answer

    def _run(self, start: Named, rows: Rows, repeat: int) -> Named:
        """Return v after the last step, from v = g, for rows g of length 1 or 0."""
        whole = self.solver.batch is None
        dtypes = [*(value.dtype for value in start.values()), self.operator.dtype]
        precision = max(torch.finfo(dtype).eps for dtype in dtypes)
        current = {name: value.clone() for name, value in start.items()}
        blocks = {name: DenseBlock(value) for name, value in current.items()}
        vectors = Rows(rows.space, blocks, rows.index)  # follows what is written to ``current``
        before = torch.full_like(lengths(start), float("inf"))
        for step in range(self.solver.depth):
            last = step + 1 == self.solver.depth
            looked = whole or last or step % CHECK == 0
            # The product is not named, so that it is freed before the next one is made.
            moved = self._advance(current, start, self.product(vectors, repeat, step), looked)
            if moved is None:
                continue
            reached = lengths(current)
            if whole:
                self._require_shrinking(moved, before + 64 * precision * reached, step)
                before = moved
            else:
                self._require_bounded(reached, step + 2, repeat, step)
            if last or (whole and bool((moved <= 4 * precision * reached).all())):
                self._report(step + 1, moved, reached)
                break
        return current

    def _advance(self, current: Named, start: Named, products: Rows, looked: bool) -> Tensor | None:
        """Add g - (H + damping I) v / s to v, and return its lengths where they are asked for."""
        moved = torch.zeros(len(products), dtype=torch.float64, device=self.device)
        found = {name: products.blocks[name].dense().values for name in current}
        for where in row_slices(current):
            moves = {}
            for name, value in current.items():
                part = found[name][where].to(value.dtype)
                move = torch.add(part, value[where], alpha=self.damping)
                moves[name] = move.div_(-self.scale).add_(start[name][where])
                value[where] += move
            if looked:
                moved[where] = squares(moves)
        return moved.sqrt() if looked else None

    def _require_shrinking(self, moved: Tensor, most: Tensor, step: int) -> None:
        """Raise when a step is longer than the one before.

        |(I - A)^t g|^2 is a sum of positive geometric sequences, so log-convex in t: once it grows
        it grows for ever.
        """
        if bool((moved <= most).all()):
            return
        raise NumericsError(
            f"solver 'lissa': diverges from step {step + 1} on with damping {self.damping:.3g} and "
            f"scale {self.scale:.3g}: H + damping I has an eigenvalue that is negative, or above "
            f"twice the scale; give more damping, the curvature 'ggn', or a larger scale"
        )

    def _require_bounded(self, reached: Tensor, most: int, repeat: int, step: int) -> None:
        """Raise when v is longer than a sum of vectors no longer than g can be."""
        if bool((reached <= 1.001 * most).all()):
            return
        raise NumericsError(
            f"solver 'lissa': diverged by step {step + 1} of repeat {repeat + 1} with damping "
            f"{self.damping:.3g} and scale {self.scale:.3g}: some samples of {self.solver.batch} "
            "examples have an eigenvalue of H + damping I that is negative, or above twice the "
            "scale; give more damping, the curvature 'ggn', a larger scale or a larger batch"
        )

    def _report(self, steps: int, moved: Tensor, reached: Tensor) -> None:
        self.iterations = max(self.iterations, steps)
        change = (moved / reached)[reached > 0]
        self.change = max([self.change, *change.tolist()])
        if self.solver.batch is None:
            self.residual = max([self.residual or 0.0, *moved.tolist()])
