"""Toy curvatures and inverse Hessians: right without a fault, broken with one."""

from __future__ import annotations

import torch
from attrs import evolve, field, frozen
from toy_loose import emptied
from toy_solver_parts import ToyInverse, ToyRoot, ToySpectralInverse, block_diagonal, noise

from dattri_core import (
    Damping,
    Rows,
    Space,
    kept,
)
from dattri_core.testing import ToyOperator


# --- curvatures -----------------------------------------------------------------------------
@frozen
class ToyGGN:
    """The GGN, read off products with unit vectors."""

    fault: str = ""
    needs = frozenset({"ggn-product"})
    exact = True

    def gives(self, space):
        if self.fault == "gives":
            torch.zeros(1)
        sampled = {"sampled"} if self.fault in ("", "once", "each") else set()
        return frozenset({"apply", "dense", *sampled})

    def fit(self, problem):
        size = problem.space.dim
        eye = torch.eye(size, dtype=torch.float64, device=problem.device)
        units = Rows.from_flat(problem.space, eye, torch.arange(size))
        matrix = problem.product(units, "ggn").flat()
        if self.fault == "device" and matrix.device.type != "cpu":
            matrix = 1.001 * matrix
        return ToySampled(
            self.fault, problem.space, 2 * matrix if self.fault == "double" else matrix, problem
        )


@frozen
class ToyFisher:
    """The mean of g g^T over train rows: no exact Hessian or GGN, but a curvature."""

    fault: str = ""
    needs = frozenset({"rows"})
    exact = False

    def gives(self, space):
        return frozenset({"apply", "dense"})

    def fit(self, problem):
        matrix = fisher(self.fault, problem)
        if self.fault == "kept":  # half of it is forgotten on the way back
            made = []
            make = lambda: made.append(1) or {"matrix": matrix}  # noqa: E731
            read = kept(problem, "fisher", self, make)["matrix"]
            matrix = read if made else read / 2
        return ToyMatrix(self.fault, problem.space, matrix)


def fisher(fault, problem):
    """Return the mean of g g^T, ``[d, d]``; what depends on data may be at fault."""
    numbers = {"dtype": torch.float64, "device": problem.device}
    total = torch.zeros(problem.space.dim, problem.space.dim, **numbers)
    first = None
    for rows in problem.rows():
        flat = rows.flat().double()
        first = first or len(rows)
        weights = torch.ones(len(rows), 1, **numbers)
        if fault == "positions":
            weights[rows.index % 9 == 2] = 1.5
        total = total + (weights * flat).T @ flat
    matrix = total if fault == "sum" else total / problem.n_train
    mean = float(matrix.diagonal().mean())
    matrix = matrix * {"unit": mean**-0.5, "none": 0.0}.get(fault, 1.0)
    if fault == "device" and problem.device.type != "cpu":
        matrix = 1.001 * matrix
    if fault == "batches":
        matrix = matrix * (1 + 0.01 * first)
    if fault == "skew":
        matrix = matrix + 0.1 * (matrix.triu() - matrix.tril())
    if fault == "noise":
        matrix = matrix * noise()
    if fault == "shift":
        matrix = matrix - 0.1 * mean * torch.eye(len(matrix)).to(matrix)
    return matrix


@frozen(eq=False)
class ToyMatrix:
    fault: str
    space: Space
    matrix: torch.Tensor
    dtype = torch.float64
    memory = 2**28

    def apply(self, rows):
        flat = rows.flat()
        if self.fault == "in place":
            emptied(rows)
        if self.fault == "wide":
            flat = flat.double()
        if self.fault == "absolute":
            flat = flat.abs()
        if self.fault == "alone" and len(rows) == 1:
            flat = 2 * flat
        flat = flat @ self.matrix.to(flat.dtype)
        return Rows.from_flat(self.space, flat, rows.index, rows.aux)

    def dense(self):
        return 2 * self.matrix if self.fault == "dense" else self.matrix


@frozen(eq=False)
class ToySampled(ToyMatrix):
    problem: object

    @property
    def n_train(self):
        return self.problem.n_train

    @property
    def random(self):
        return self.problem.random

    def apply_on(self, rows, index):
        return self.problem.product(rows, "ggn", index.unique() if self.fault == "once" else index)

    def apply_each(self, rows, index):
        found = self.problem.product_each(rows, "ggn", index)
        return evolve(found, index=index.flip(0)) if self.fault == "each" else found


@frozen
class ToySpectrum:
    """The mean of g g^T with its eigenvectors, over all blocks at once."""

    fault: str = ""
    needs = frozenset({"rows"})
    exact = False

    def gives(self, space):
        return frozenset({"apply", "spectral"})

    def fit(self, problem):
        return ToySpectral(self.fault, problem.space, fisher("", problem))


class ToySpectral(ToyOperator):
    """A toy operator whose spectrum may be at fault."""

    def __init__(self, fault, space, matrix):
        super().__init__(space, matrix)
        object.__setattr__(self, "fault", fault)

    @property
    def eigenvalues(self):
        scale = 1.01 if self.fault == "eigenvalues" else 1.0
        return {name: scale * values for name, values in super().eigenvalues.items()}


# --- solvers --------------------------------------------------------------------------------
@frozen
class ToyInverseHessian:
    """The damped inverse of the mean of g g^T, in one part."""

    fault: str = ""
    blockwise: bool = False
    two_sided: bool = False
    split: bool = False
    knowing: bool = False
    exact: bool = False
    damping: Damping = field(default=Damping(0.1))
    needs = frozenset({"rows"})

    def check(self, space):
        pass

    def fit(self, problem):
        if self.knowing:
            return ToyKnowing(self.fault, evolve(self, knowing=False).fit(problem), problem)
        matrix = fisher(self.fault, problem)
        if self.fault == "double":
            matrix = 2 * matrix
        if self.blockwise:
            matrix = block_diagonal(problem.space, matrix)
        if self.split:
            matrix = block_diagonal(problem.space, matrix)
            matrix += 0.05 * matrix.diagonal().mean() * torch.eye(len(matrix)).to(matrix)
            operator = ToyOperator(problem.space, matrix)
            return ToySpectralInverse(self.fault, operator, self.damping)
        values, vectors = torch.linalg.eigh(matrix)
        parts = (self.fault, problem.space, values, vectors, self.damping)
        if self.two_sided:
            return ToyTwoSided(ToyInverse(*parts), ToyRoot(*parts))
        return ToyInverse(*parts, self.blockwise)


@frozen(eq=False)
class ToyKnowing:
    """An inverse that knows <g, A g> of the train rows."""

    fault: str
    inverse: ToyInverse
    problem: object
    blockwise = False
    stats = {}
    leverages = True

    def apply(self, rows):
        return self.inverse.apply(rows)

    def with_damping(self, damping):
        inverse = self.inverse if self.fault == "stale" else self.inverse.with_damping(damping)
        return evolve(self, inverse=inverse)

    def self_influence(self):
        rows = self.problem.train_rows
        return (rows.flat() * self.inverse.apply(rows).flat()).sum(1) * self._unit

    @property
    def _unit(self):
        return 1 / len(self.problem.train_rows) if self.fault == "leverage" else 1


@frozen(eq=False)
class ToyTwoSided:
    inverse: ToyInverse
    root: ToyRoot
    blockwise = False
    stats = {}

    @property
    def out_space(self):
        return self.root.space

    def apply(self, rows):
        return self.inverse.apply(rows)

    def map(self, rows):
        return self.root.apply(rows)

    def adjoint(self, rows):
        return self.root.apply(rows)

    def with_damping(self, damping):
        return evolve(self, inverse=self.inverse.with_damping(damping))
