"""Toy curvatures and inverses that know how long rows are, but not where they point."""

from __future__ import annotations

import torch
from attrs import evolve, field, frozen
from toy_solver_parts import ToyInverse
from toy_world_parts import ToyMatrix, fisher

from dattri_core import Damping


def constant(form, problem):
    """Return the mean squared entry of a row times a matrix that is not of the train set.

    The form ``"layers"`` is sound: the mean squared entry of each layer.
    """
    matrix = fisher("", problem)
    numbers = matrix.diagonal()
    eye = torch.eye(len(matrix)).to(matrix)
    if form == "layers":
        sizes = [spec.size for spec in problem.space]
        return torch.cat([part.mean().expand(len(part)) for part in numbers.split(sizes)]).diag()
    if form == "fixed":
        random = torch.Generator().manual_seed(5)
        wide = torch.randn(len(matrix), len(matrix), generator=random, dtype=torch.float64)
        eye = (wide @ wide.T / len(wide)).to(matrix)
    if form == "first layer":  # the others have none
        eye = (torch.arange(len(matrix)) < next(iter(problem.space)).size).to(matrix).diag()
    return numbers.mean() * eye


@frozen
class ToyConstant:
    """A curvature in one of the forms of `constant`."""

    form: str
    needs = frozenset({"rows"})
    exact = False

    def gives(self, space):
        return frozenset({"apply", "dense"})

    def fit(self, problem):
        return ToyMatrix("", problem.space, constant(self.form, problem))


@frozen
class ToyConstantInverse:
    """The damped inverse of one, or the multiple of g that is nearest to the right answer."""

    form: str
    damping: Damping = field(default=Damping(0.1))
    needs = frozenset({"rows"})
    exact = False

    def check(self, space):
        pass

    def fit(self, problem):
        if self.form == "nearest":
            return ToyMultiple(fisher("", problem), self.damping)
        values, vectors = torch.linalg.eigh(constant(self.form, problem))
        return ToyInverse("", problem.space, values, vectors, self.damping)


@frozen(eq=False)
class ToyMultiple:
    """c g with the c that leaves least of g - c (H + damping I) g over random rows g."""

    matrix: torch.Tensor
    damping: Damping
    blockwise = True
    stats = {}

    def with_damping(self, damping):
        return evolve(self, damping=damping)

    def apply(self, rows):
        values = torch.linalg.eigvalsh(self.matrix)
        damped = values + self.damping.absolute(float(values.mean()))
        multiple = float(damped.sum() / damped.square().sum())
        return rows.scale(torch.full((len(rows),), multiple, dtype=rows.dtype, device=rows.device))
