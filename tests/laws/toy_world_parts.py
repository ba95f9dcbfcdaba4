"""Toy sources, curvatures and inverse Hessians: right without a fault, broken with one."""

from __future__ import annotations

import torch
from attrs import evolve, field, frozen
from toy_loose import emptied
from toy_solver_parts import ToyInverse, ToyRoot, ToySpectralInverse, block_diagonal, noise

from dattri_core import (
    Damping,
    DenseBlock,
    Evaluator,
    Rows,
    Space,
    SpecError,
    kept,
    leaves,
)
from dattri_core.batch import batch_size, take, tensors_of
from dattri_core.testing import ToyOperator, place, plain_space


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

    def move(self, bound, checkpoint):
        if self.fault == "stays":
            return bound
        return evolve(bound, evaluator=bound.evaluator.moved_to(checkpoint))

    def reopen(self, task, checkpoint, sample):
        bound = self.bind(task, checkpoint, sample)
        return evolve(bound, fault="sign") if self.fault == "reopened" else bound


@frozen
class ToyEnsemble:
    """Networks whose outputs are multiplied by 1, 2, ...: a factor for each member."""

    fault: str = ""
    members: int = 3
    provides = ToySource.provides

    def bind(self, task, checkpoint, sample):
        factor = 2 if self.fault == "same" else 1 + checkpoint.member
        hooks = {"": lambda model, args, output: factor * output}
        return ToySource().bind(task, evolve(checkpoint, hooks=hooks), sample)


@frozen
class ToyFeatures:
    """Gradients that say nothing of parameters."""

    fault: str = ""
    provides = ToySource.provides

    def bind(self, task, checkpoint, sample):
        bound, means = ToySource().bind(task, checkpoint, sample), {"train": {}, "test": {}}
        for role in means if self.fault == "centred" else ():

            def note(name, block, held=means[role]):
                held[name] = block.dense().values.mean(0)

            bound.stream(sample, role, note)
        space = Space(tuple(evolve(block, parameters=()) for block in bound.space))
        return BoundToyFeatures(self.fault, bound, space, means)


@frozen(eq=False)
class BoundToyFeatures:
    fault: str
    bound: object
    space: Space
    means: dict

    def stream(self, batch, role, sink):
        mean = self.fault == "length" and isinstance(batch, dict)
        length = batch["labels"].shape[1] if mean else 1  # padding counted too

        def centred(name, block):
            values = block.dense().values / length
            sink(name, DenseBlock(values - self.means[role].get(name, 0.0)))

        return self.bound.stream(batch, "train" if self.fault == "one role" else role, centred)


@frozen
class ToySided:
    """Squares of gradients, with their signs, as train rows; gradients as test rows."""

    fault: str = ""
    provides = ToySource.provides
    sides_differ = True

    def bind(self, task, checkpoint, sample):
        bound = ToyFeatures().bind(task, checkpoint, sample)
        return BoundToySided(self.fault, bound.bound, bound.space)


@frozen(eq=False)
class BoundToySided:
    fault: str
    bound: object
    space: Space

    def stream(self, batch, role, sink):
        def bent(name, block):
            values = block.dense().values
            bends = role == "train" and self.fault != "alike"
            sink(name, DenseBlock(values * values.abs() if bends else values))

        return self.bound.stream(batch, role, bent)


@frozen
class ToyDataSource:
    """Gradients times the mean number of an example of the train set."""

    fault: str = ""
    provides = ToySource.provides

    def bind(self, task, checkpoint, sample):
        if self.fault == "binds":
            return ToySource().bind(task, checkpoint, sample)
        raise SpecError("toy: it is fitted on the train set")

    def fit(self, task, checkpoint, examples, memory):
        bound = ToySource().bind(task, checkpoint, examples.sample(3))
        count = 1 if self.fault == "first" else len(examples)
        batch = examples.take(torch.arange(count))
        tensors = [t.double().abs() for t in tensors_of(batch)]
        factor = torch.stack([t.flatten(1).sum(1) if t.dim() > 1 else t for t in tensors]).mean()
        blocks = tuple(evolve(block, parameters=()) for block in bound.space)
        return BoundToyDataSource(bound, Space(blocks), float(factor))


@frozen(eq=False)
class BoundToyDataSource:
    bound: object
    space: Space
    factor: float

    def stream(self, batch, role, sink):
        def times(name, block):
            sink(name, DenseBlock(self.factor * block.dense().values))

        return self.bound.stream(batch, role, times)


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
        if self.fault == "device" and flat.device.type != "cpu":
            flat = 1.001 * flat
        if self.fault == "half" and role == "train":
            flat = flat / 2
        if self.fault == "sign" and role == "test":
            flat = -flat
        if self.fault == "clip":
            flat = flat * (30 / flat.norm(dim=1, keepdim=True)).clamp_max(1)
        if self.fault == "coarse" and flat.dtype == torch.float32:
            flat = flat.bfloat16().float()
        if self.fault == "graph":
            flat = flat * torch.ones((), dtype=flat.dtype, device=flat.device, requires_grad=True)
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


@frozen
class ToyMargin:
    """Half of the gradient with the residual 2: rows of half of the loss as a margin."""

    fault: str = ""
    provides = frozenset({"residual"})

    def bind(self, task, checkpoint, sample):
        return BoundToyMargin(self.fault, ToySource().bind(task, checkpoint, sample))


@frozen(eq=False)
class BoundToyMargin:
    fault: str
    inner: BoundToySource

    @property
    def evaluator(self):
        return self.inner.evaluator

    @property
    def space(self):
        return self.inner.space

    def stream(self, batch, role, sink):
        half = 0.5 if role == "train" else 1.0
        scale = torch.full((batch_size(batch),), half, device=self.evaluator.device)
        self.inner.stream(batch, role, lambda name, block: sink(name, block.scale(scale)))
        return {"residual": 1.01 / scale if self.fault == "residual" else 1 / scale}


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
