"""A toy `Problem`: a world whose rows and curvature come from the dense oracles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from dattri_core.batch import Batch, batch_size, move, take
from dattri_core.blocks import Block
from dattri_core.laws.oracles import (
    ggn,
    hessian,
    output_columns,
    plain_rows,
    plain_space,
    pulled_rows,
    singles,
)
from dattri_core.laws.worlds import World, cast, language, logistic, network
from dattri_core.losses import Loss
from dattri_core.protocols import CurvatureKind, RandomStream, Role, RowKind
from dattri_core.rows import Rows
from dattri_core.space import Space
from dattri_core.task import Task


@frozen(eq=False)
class DenseProblem:
    """The train set of a world in float64, by loops of single examples.

    Labels are drawn by the place of an example in the world, not in this train set, so that what is
    made of them obeys the laws about other orders and copies of the train set exactly.

    Args:
        world: Where it comes from.
        task: The world's task.
        train: The train set.
        origin: Which example of the world each train example is, ``[n]``.
        train_rows: Gradients of single examples.
        ggn_rows: Those of the columns of the GGN's factor, example after example.
        matrices: Mean Hessian and mean GGN, ``[d, d]``.
        convex: Whether the loss is convex in the parameters.
        batch: Rows at a time.
        seed: Of the fit.
        reference: The test set of the world, as a problem of its own.
        role: Of the rows of kind ``"loss"``.
        dtype: Of the rows that are read; what they are made from is float64.
        singles: Curvature of each example by kind, ``[n, d, d]``, made when it is first asked for.
    """

    world: World
    task: Task
    train: Batch
    origin: Tensor
    train_rows: Rows
    ggn_rows: Rows
    matrices: dict[CurvatureKind, Tensor]
    convex: bool = False
    batch: int = 4
    seed: int = 0
    reference: DenseProblem | None = None
    role: Role = "train"
    dtype: torch.dtype = torch.float64
    singles: dict[CurvatureKind, Tensor] = field(factory=dict)

    @property
    def space(self) -> Space:
        """Return the space of the rows."""
        return self.train_rows.space

    @property
    def n_train(self) -> int:
        """Return the number of examples."""
        return len(self.train_rows)

    @property
    def device(self) -> torch.device:
        """Return where the model is."""
        return self.task.device

    @property
    def random(self) -> RandomStream:
        """Return the stream of the seed."""
        return RandomStream(self.seed, "law")

    @property
    def memory(self) -> int:
        """Return 256 MiB."""
        return 2**28

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Return the weights of the world's model."""
        return self.task.model.state_dict()

    def epsilon(self, *, tf32: bool = True) -> float:
        """Return the epsilon of the dtype of the model, which rounds no products."""
        return torch.finfo(self.dtype).eps

    def on(self, device: torch.device) -> DenseProblem:
        """Return the same problem on a device."""
        return evolve(
            self,
            task=self.world.task(device=device),
            train=move(self.train, device),
            train_rows=self.train_rows.to(device),
            ggn_rows=self.ggn_rows.to(device),
            matrices={kind: matrix.to(device) for kind, matrix in self.matrices.items()},
            singles={kind: single.to(device) for kind, single in self.singles.items()},
            reference=None if self.reference is None else self.reference.on(device),
        )

    @property
    def low(self) -> DenseProblem:
        """Return the same problem in float32."""
        return evolve(
            self,
            task=self.world.task(torch.float32),
            dtype=torch.float32,
            singles={},
            reference=None if self.reference is None else self.reference.low,
        )

    def batches(self) -> Iterator[Batch]:
        """Read the train set in order."""
        for start in range(0, self.n_train, self.batch):
            yield cast(take(self.train, slice(start, start + self.batch)), self.dtype)

    def rows(
        self, index: Tensor | None = None, *, kind: RowKind = "loss", draw: int = 0
    ) -> Iterator[Rows]:
        """Read the rows of a kind, all in order or those of the given positions."""
        chosen = torch.arange(self.n_train) if index is None else index
        if kind == "ggn":
            owners = self.ggn_rows.index
            places = [(owners == at).nonzero().flatten() for at in chosen]
            found = self.ggn_rows.take(torch.cat([*places, owners[:0]]))
        else:
            found = self._single(kind, draw).take(chosen)
        for start in range(0, len(found), self.batch):
            part = found.take(slice(start, start + self.batch)).to(dtype=self.dtype)
            yield part

    def stream(
        self,
        sink: Callable[[str, Block, Tensor], None],
        *,
        kind: RowKind = "loss",
        draw: int = 0,
        index: Tensor | None = None,
    ) -> None:
        """Hand the rows of `rows` over block by block, the last block first."""
        for rows in self.rows(index, kind=kind, draw=draw):
            for name in reversed(rows.space.names):
                sink(name, rows.blocks[name], rows.index)

    def product(self, vectors: Rows, kind: CurvatureKind, index: Tensor | None = None) -> Rows:
        """Return the mean curvature times every vector."""
        self.space.require_same(vectors.space, "curvature product")
        matrix = self.matrices[kind]
        if index is not None:
            single = self._singles(kind)
            count = torch.bincount(index.to(single.device), minlength=self.n_train)
            matrix = torch.tensordot(count.to(single) / len(index), single, 1)
        flat = vectors.flat().double() @ matrix
        return Rows.from_flat(self.space, flat.to(vectors.dtype), vectors.index, vectors.aux)

    def product_each(self, vector: Rows, kind: CurvatureKind, index: Tensor) -> Rows:
        """Return the curvature of each of some examples times one vector."""
        ones = [self.product(vector, kind, at.unsqueeze(0)).flat() for at in index]
        return Rows.from_flat(self.space, torch.cat(ones), index)

    def _singles(self, kind: CurvatureKind) -> Tensor:
        """Return the curvature of each example, in float64, ``[n, d, d]``."""
        if kind not in self.singles:
            # by the oracles of the CPU, wherever the problem is
            task, train = self.world.task(self.dtype), move(self.train, torch.device("cpu"))
            found = _of_each(kind, task, self.space, cast(train, self.dtype))
            self.singles[kind] = found.to(self.device)
        return self.singles[kind]

    def _single(self, kind: RowKind, draw: int) -> Rows:
        """Return the rows of a kind that has one for each example."""
        if kind == "loss":
            return self.train_rows
        return self._fisher(draw) if kind == "fisher" else self._leading(draw)

    def _leading(self, place: int) -> Rows:
        """Return the gradients along an eigenvector of the criterion's Hessian, zero where none."""
        task, train = self.world.task(), move(self.train, torch.device("cpu"))
        owners, columns = output_columns(task, train)  # eigenvalues ascend
        directions = torch.zeros(self.n_train, *columns.shape[1:], dtype=torch.float64)
        for at in range(self.n_train):
            own = columns[owners == at]
            if place < len(own):
                directions[at] = own[-1 - place]
        return pulled_rows(task, self.space, train, directions).to(self.device)

    def _fisher(self, draw: int) -> Rows:
        """Return the gradients at labels drawn from the model, one a train example.

        The oracles are those of the CPU, wherever the problem is.
        """
        task, train = self.world.task(), move(self.train, torch.device("cpu"))
        loss = task.loss
        assert isinstance(loss, Loss)
        assert loss.sample is not None
        generators = [self.random.generator("fisher", int(at), draw) for at in self.origin]
        with torch.no_grad():
            outputs = loss.forward(task.model, train)

        def uniforms(*shape: int) -> Tensor:
            numbers = [torch.rand(shape, generator=g, dtype=torch.float64) for g in generators]
            return torch.stack(numbers)

        directions = loss.sample(outputs, train, uniforms)
        return pulled_rows(task, self.space, train, directions).to(self.device)


@cache
def problem_of(world: World, order: tuple[int, ...] | None = None, copies: int = 1) -> DenseProblem:
    """Return the problem of a world, its train set in another order or several times over."""
    if order is None and copies == 1:
        asked = evolve(_dense(world, world.test), role="test")
        return evolve(_dense(world, world.train), reference=asked)
    whole = problem_of(world)
    origin = torch.arange(whole.n_train) if order is None else torch.tensor(order)
    return _chosen(whole, origin.repeat(copies))


def _chosen(whole: DenseProblem, origin: Tensor) -> DenseProblem:
    """Return the problem of chosen train examples of another one, by their places there."""
    train, task = take(whole.train, origin), whole.world.task()
    owners = [(whole.ggn_rows.index == at).nonzero().flatten() for at in origin]
    index = torch.cat([torch.full_like(rows, at) for at, rows in enumerate(owners)])
    counts = torch.bincount(origin, minlength=whole.n_train)
    alike = bool((counts == counts[0]).all())
    ggns = whole.singles["ggn"][origin]
    return evolve(
        whole,
        task=task,
        train=train,
        origin=origin,
        train_rows=evolve(whole.train_rows.take(origin), index=torch.arange(len(origin))),
        ggn_rows=evolve(whole.ggn_rows.take(torch.cat(owners)), index=index),
        matrices={
            "hessian": whole.matrices["hessian"] if alike else hessian(task, whole.space, train),
            "ggn": ggns.mean(0),
        },
        singles={"ggn": ggns},
    )


def _of_each(kind: CurvatureKind, task: Task, space: Space, batch: Batch) -> Tensor:
    """Return the curvature of each example, in float64, ``[n, d, d]``."""
    oracle = {"hessian": hessian, "ggn": ggn}[kind]
    return torch.stack([oracle(task, space, one) for one in singles(batch)]).double()


def _dense(world: World, train: Batch) -> DenseProblem:
    task = world.task()
    space = plain_space(task)
    owners, columns = output_columns(task, train)
    ggns = _of_each("ggn", task, space, train)
    matrices: dict[CurvatureKind, Tensor] = {
        "hessian": hessian(task, space, train),
        "ggn": ggns.mean(0),
    }
    return DenseProblem(
        world=world,
        task=task,
        train=train,
        origin=torch.arange(batch_size(train)),
        train_rows=plain_rows(task, space, train),
        ggn_rows=evolve(pulled_rows(task, space, take(train, owners), columns), index=owners),
        matrices=matrices,
        convex=world.convex,
        singles={"ggn": ggns},
    )


@cache
def curvature_worlds() -> tuple[World, ...]:
    """Return worlds with a convex loss, with a saddle, and with sequences."""
    return (logistic(), network(), language())
