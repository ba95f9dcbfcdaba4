"""Toy sources: right without a fault, broken with one."""

from __future__ import annotations

import torch
from attrs import evolve, frozen
from toy_solver_parts import noise

from dattri_core import (
    DenseBlock,
    Evaluator,
    Rows,
    Space,
    SpecError,
    leaves,
)
from dattri_core.batch import batch_size, take, tensors_of
from dattri_core.testing import place, plain_space


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
