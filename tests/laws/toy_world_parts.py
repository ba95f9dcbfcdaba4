"""Toy sources, curvatures, solvers and inverse Hessians: right without a fault, broken with one."""

from __future__ import annotations

import torch
from attrs import evolve, field, frozen

from dattri_core import (
    BlockSpec,
    Damping,
    DenseBlock,
    Evaluator,
    NumericsError,
    Rows,
    Space,
    leaves,
)
from dattri_core.batch import batch_size, take
from dattri_core.testing import ToyOperator, place, plain_space


def noise():
    """Return a factor that differs from 1 in the last digits, from the global random state."""
    return 1 + 1e-12 * torch.rand((), dtype=torch.float64)


# --- sources --------------------------------------------------------------------------------
@frozen
class ToySource:
    """Gradients by a loop of backward passes."""

    fault: str = ""
    provides = frozenset({"place"})

    def bind(self, task, checkpoint, sample):
        evaluator = Evaluator(task, checkpoint, sample)
        blocks = plain_space(task)
        if self.fault == "everything":
            blocks = plain_space(type(task)(task.model, task.loss))
        space = Space(tuple(evolve(block, kind="dense") for block in blocks))
        return BoundToySource(self.fault, evaluator, space)


@frozen(eq=False)
class BoundToySource:
    fault: str
    evaluator: Evaluator
    space: Space

    def stream(self, batch, role, sink):
        count = batch_size(batch)
        weights = {n: self.evaluator.parameters[n] for n in self.space.parameter_names}
        if self.fault == "live":
            model = self.evaluator.task.model
            weights = {n: p for n, p in model.named_parameters() if n in weights}
        if self.fault == "eval":
            self.evaluator.task.model.eval()

        def total(leaf, i):
            return self.evaluator.total(leaf, take(batch, slice(i, i + 1)), role)

        flat = self._gradients(total, weights, count)
        if self.fault == "centre" and count > 1:
            flat = flat - flat.mean(0)
        if self.fault == "noise":
            flat = flat * noise()
        if self.fault == "half" and role == "train":
            flat = flat / 2
        if self.fault == "sign" and role == "test":
            flat = -flat
        if self.fault == "clip":
            flat = flat * (30 / flat.norm(dim=1, keepdim=True)).clamp_max(1)
        if self.fault == "coarse" and flat.dtype == torch.float32:
            flat = flat.bfloat16().float()
        made = Rows.from_flat(self.space, flat, torch.arange(count))
        for name, block in made.blocks.items():
            sink(name, block)
        if self.fault == "twice":
            sink(name, block)
        aux = {"place": torch.arange(count)}
        return {**aux, "more": torch.arange(count)} if self.fault == "aux" else aux

    def pull(self, batch, cotangent, sink):
        evaluator, count = self.evaluator, batch_size(batch)
        weights = {n: evaluator.parameters[n] for n in self.space.parameter_names}
        with evaluator.session(), torch.no_grad():
            outputs = evaluator.outputs(None, batch)
        directions = cotangent(outputs)
        if self.fault == "pull scale":
            directions = 1.001 * directions
        if self.fault == "pull bend":  # slopes in the toy worlds are smaller
            directions = directions.clamp(-100, 100)
        if self.fault == "pull place":
            directions = directions * (1 if count == 9 else 1.01)

        def total(leaf, i):
            own = evaluator.outputs(leaf, take(batch, slice(i, i + 1)))
            return (own * directions[i : i + 1]).sum()

        flat = self._gradients(total, weights, count)
        for name, block in Rows.from_flat(self.space, flat, torch.arange(count)).blocks.items():
            sink(name, block)

    def _gradients(self, total, weights, count):
        rows = []
        with self.evaluator.session():
            for i in range(count):
                leaf = leaves(weights)
                grads = torch.autograd.grad(total(leaf, i), list(leaf.values()))
                one = {n: g.unsqueeze(0) for n, g in zip(leaf, grads, strict=True)}
                rows.append(place(self.space, one))
        return torch.cat(rows).to(self.evaluator.dtype)


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
        return frozenset({"apply", "dense"})

    def fit(self, problem):
        size = problem.space.dim
        eye = torch.eye(size, dtype=torch.float64)
        units = Rows.from_flat(problem.space, eye, torch.arange(size))
        matrix = problem.product(units, "ggn").flat()
        return ToyMatrix(
            self.fault, problem.space, 2 * matrix if self.fault == "double" else matrix
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
        return ToyMatrix(self.fault, problem.space, fisher(self.fault, problem))


def fisher(fault, problem):
    """Return the mean of g g^T, ``[d, d]``; what depends on data may be at fault."""
    total = torch.zeros(problem.space.dim, problem.space.dim, dtype=torch.float64)
    first = None
    for rows in problem.rows():
        flat = rows.flat()
        first = first or len(rows)
        weights = torch.ones(len(rows), 1, dtype=torch.float64)
        if fault == "positions":
            weights[rows.index % 9 == 2] = 1.5
        total = total + (weights * flat).T @ flat
    matrix = total if fault == "sum" else total / problem.n_train
    if fault == "batches":
        matrix = matrix * (1 + 0.01 * first)
    if fault == "skew":
        matrix = matrix + 0.1 * (matrix.triu() - matrix.tril())
    if fault == "noise":
        matrix = matrix * noise()
    if fault == "shift":
        matrix = matrix - 0.1 * matrix.diagonal().mean() * torch.eye(len(matrix))
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
        if self.fault == "absolute":
            flat = flat.abs()
        if self.fault == "alone" and len(rows) == 1:
            flat = 2 * flat
        flat = flat @ self.matrix.to(flat.dtype)
        return Rows.from_flat(self.space, flat, rows.index, rows.aux)

    def dense(self):
        return 2 * self.matrix if self.fault == "dense" else self.matrix


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
class ToySolver:
    """The damped inverse by eigenvalues; with ``exact`` false it declares that it approximates."""

    damping: Damping = field(
        default=Damping(1e-3), converter=lambda d: d if isinstance(d, Damping) else Damping(d)
    )
    fault: str = ""
    exact: bool = True
    reduced: bool = False
    blockwise: bool = False
    needs = frozenset({"dense"})

    def check(self, space):
        pass

    def out_space(self, space):
        return _coordinates(space) if self.reduced else space

    def solve_for(self, operator, device):
        matrix = operator.dense()
        if self.blockwise:
            matrix = block_diagonal(operator.space, matrix)
        values, vectors = torch.linalg.eigh(matrix)
        if self.fault == "shift" and values[0] < -1e-9:
            raise NumericsError("indefinite")
        made = ToyInverse(self.fault, operator.space, values, vectors, self.damping, self.blockwise)
        return ToyReduced(made) if self.reduced else made


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


def block_diagonal(space, matrix):
    """Return a matrix without the entries between two blocks of a space."""
    sizes = torch.tensor([spec.size for spec in space])
    of = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return matrix * (of[:, None] == of[None])


def _coordinates(space):
    return Space((BlockSpec("eigenvectors", "dense", (space.dim,)),))


@frozen(eq=False)
class ToyReduced:
    """The inverse in coordinates: Q^T g on the train side, Q^T A h on the test side."""

    inner: object
    blockwise = False

    @property
    def stats(self):
        return self.inner.stats

    @property
    def train_map(self):
        return ToyCoordinates(self.inner.space, self.inner.vectors, self.inner.fault)

    def with_damping(self, damping):
        return ToyReduced(self.inner.with_damping(damping))

    def apply(self, rows):
        sides = ToyCoordinates(self.inner.space, self.inner.vectors)
        return sides.map(self.inner.apply(rows))


@frozen(eq=False)
class ToyCoordinates:
    space: Space
    vectors: torch.Tensor
    fault: str = ""
    blockwise = False

    @property
    def out_space(self):
        return _coordinates(self.space)

    def map(self, rows):
        flat = rows.flat() @ self.vectors.to(rows.dtype)
        index = torch.arange(len(rows)) if self.fault == "sides" else rows.index
        return Rows.from_flat(self.out_space, flat, index, rows.aux)

    def adjoint(self, rows):
        flat = rows.flat() @ self.vectors.to(rows.dtype).T
        return Rows.from_flat(self.space, flat, rows.index, rows.aux)


@frozen(eq=False)
class ToyInverse:
    fault: str
    space: Space
    values: torch.Tensor
    vectors: torch.Tensor
    damping: Damping
    blockwise: bool = False

    @property
    def stats(self):
        told = self.fault in ("", "early") and not self.blockwise
        return {"residual": 1e-13} if told else {}

    def with_damping(self, damping):
        return self if self.fault == "keep" else evolve(self, damping=damping)

    def _apply(self, flat):
        mean = float(self.values.max() if self.fault == "relative" else self.values.mean())
        damping = self.damping.absolute(mean)
        if self.fault == "floor":
            damping = min(damping, 1e3)
        values = self.values.clamp_min(0) if self.fault == "clip" else self.values
        live = values.abs() > 1e-12 * values.abs().max()
        definite = bool(values[0] > 1e-9)
        values = values + damping + (0.01 if self.fault == "shift" and definite else 0)
        inverse = live / values if self.fault == "range" else 1 / values
        return ((flat @ self.vectors) * inverse) @ self.vectors.T

    def apply(self, rows):
        if self.blockwise and len(rows.space) < len(self.space):
            blocks = {
                spec.name: rows.blocks.get(spec.name)
                or DenseBlock(torch.zeros(len(rows), *spec.shape, dtype=rows.dtype))
                for spec in self.space
            }
            whole = self.apply(Rows(self.space, blocks, rows.index, rows.aux))
            part = whole.select(rows.space.names)
            return part.scale(torch.full((len(rows),), 1.001 if self.fault == "leak" else 1.0))
        given = rows.flat()
        flat = given.double()
        if self.fault == "zero":
            size = flat.norm(dim=1, keepdim=True)
            found = self._apply(flat / size) * size
        else:
            found = self._apply(flat)
        if self.fault == "bend":
            found = found + 1e-3 * self._apply(found * found.abs())
        if self.fault == "skew":
            turn = torch.ones(self.space.dim, self.space.dim, dtype=torch.float64)
            found = found + 1e-3 * self._apply(found @ (turn.triu() - turn.tril()))
        if self.fault == "alone" and len(rows) == 1:
            found = 1.001 * found
        if self.fault == "formed" and all(b.positions is None for b in rows.blocks.values()):
            found = 2 * found
        if self.fault == "noise":
            found = found * noise()
        if self.fault == "early":
            found = found * (1 + 1e-7)
        if self.fault == "coarse" and given.dtype == torch.float32:
            found = 1.01 * found
        if self.fault == "negative":
            found = -found
        return Rows.from_flat(self.space, found.to(given.dtype), rows.index, rows.aux)


@frozen
class ToySpectralSolver:
    """The damped inverse from the spectrum of an operator, block by block where it has blocks."""

    damping: Damping = field(
        default=Damping(1e-3), converter=lambda d: d if isinstance(d, Damping) else Damping(d)
    )
    fault: str = ""
    exact: bool = True
    needs = frozenset({"spectral"})

    def check(self, space):
        pass

    def solve_for(self, operator, device):
        return ToySpectralInverse(self.fault, operator, self.damping)


@frozen(eq=False)
class ToySpectralInverse:
    fault: str
    operator: ToyOperator
    damping: Damping
    stats = {}

    @property
    def blockwise(self):
        return self.operator.basis.blockwise

    def with_damping(self, damping):
        return evolve(self, damping=damping)

    def _damping(self, name):
        values, space = self.operator.eigenvalues, self.operator.space
        if self.blockwise and self.fault != "whole":
            return self.damping.absolute(float(values[name].sum()) / space[name].size)
        return self.damping.absolute(sum(float(v.sum()) for v in values.values()) / space.dim)

    def apply(self, rows):
        basis, found = self.operator.basis, {}
        wide = rows.to(dtype=torch.float64)
        turned = basis.map(wide)
        for name, block in turned.blocks.items():
            damping = self._damping(name)
            weight = 1 / (self.operator.eigenvalues[name] + damping) - 1 / damping
            found[name] = DenseBlock(block.flat() * weight)
        answer = basis.adjoint(Rows(turned.space, found, rows.index))
        parts = []
        for name in rows.space.names:
            damping = self._damping(name if self.blockwise else "all")
            parts.append(answer.blocks[name].flat() + wide.blocks[name].flat() / damping)
        return Rows.from_flat(rows.space, torch.cat(parts, 1).to(rows.dtype), rows.index, rows.aux)


@frozen
class ToyInverseHessian:
    """The damped inverse of the mean of g g^T, in one part."""

    fault: str = ""
    blockwise: bool = False
    two_sided: bool = False
    needs = frozenset({"rows"})

    def check(self, space):
        pass

    def fit(self, problem):
        matrix = fisher(self.fault, problem)
        if self.blockwise:
            matrix = block_diagonal(problem.space, matrix)
        values, vectors = torch.linalg.eigh(matrix)
        parts = (self.fault, problem.space, values, vectors, Damping(0.1))
        if self.two_sided:
            return ToyTwoSided(ToyInverse(*parts), ToyRoot(*parts))
        return ToyInverse(*parts, self.blockwise)


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
