"""Toy roots of inverses, for the two-sided form: right without a fault, broken with one."""

from __future__ import annotations

import torch
from attrs import evolve, frozen
from toy_world_parts import ToyInverse, ToyInverseHessian, ToySolver

from dattri_core import Damping, NumericsError, Rows, Space


@frozen
class ToyRootSolver(ToySolver):
    """A solver that knows the root of its inverse too."""

    def root_for(self, operator, device):
        values, vectors = torch.linalg.eigh(operator.dense())
        if self.fault == "hide":
            values = values.clamp_min(0)
        return ToyRoot(self.fault, operator.space, values, vectors, self.damping)


@frozen(eq=False)
class ToyRoot:
    fault: str
    space: Space
    values: torch.Tensor
    vectors: torch.Tensor
    damping: Damping
    blockwise = False
    stats = {}

    def with_damping(self, damping):
        return evolve(self, damping=damping)

    def apply(self, rows):
        shifted = self.values + self.damping.absolute(float(self.values.mean()))
        if float(shifted.min()) <= 0:
            raise NumericsError("no real root")
        power = -0.6 if self.fault == "power" else -0.5
        flat = rows.flat()
        turned = flat.double() @ self.vectors * shifted**power
        if self.fault != "turned":
            turned = turned @ self.vectors.T
        return Rows.from_flat(self.space, turned.to(flat.dtype), rows.index, rows.aux)


@frozen
class ToyRootHessian(ToyInverseHessian):
    """The same inverse Hessian in two-sided form."""

    def fit(self, problem):
        one = ToyInverseHessian("").fit(problem)
        root = ToyRoot(self.fault, one.space, one.values, one.vectors, one.damping)
        return ToyTwoSided(one, root)


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
