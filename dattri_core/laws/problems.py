"""A toy `Problem`: a world whose rows and curvature come from the dense oracles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core.batch import batch_size, join, take
from dattri_core.laws.oracles import ggn, hessian, plain_rows, plain_space
from dattri_core.laws.worlds import World, language, logistic, network
from dattri_core.protocols import CurvatureKind, RandomStream
from dattri_core.rows import Rows
from dattri_core.space import Space


@frozen(eq=False)
class DenseProblem:
    """The train set of a world, all of it computed once in float64.

    Args:
        name: Of the world.
        train_rows: Gradients of single examples.
        matrices: Mean Hessian and mean GGN, ``[d, d]``.
        convex: Whether the loss is convex in the parameters.
        batch: Rows at a time.
        seed: Of the fit.
    """

    name: str
    train_rows: Rows
    matrices: dict[CurvatureKind, Tensor]
    convex: bool = False
    batch: int = 4
    seed: int = 0

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
        """Return the CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Return float64."""
        return torch.float64

    @property
    def random(self) -> RandomStream:
        """Return the stream of the seed."""
        return RandomStream(self.seed, "law")

    @property
    def memory(self) -> int:
        """Return 256 MiB."""
        return 2**28

    def rows(self, index: Tensor | None = None) -> Iterator[Rows]:
        """Stream the rows, all in order or those of the given positions."""
        chosen = torch.arange(self.n_train) if index is None else index
        for start in range(0, len(chosen), self.batch):
            yield self.train_rows.take(chosen[start : start + self.batch])

    def product(self, vectors: Rows, kind: CurvatureKind) -> Rows:
        """Return the mean curvature times every vector."""
        self.space.require_same(vectors.space, "curvature product")
        flat = vectors.flat().double() @ self.matrices[kind]
        return Rows.from_flat(self.space, flat.to(vectors.dtype), vectors.index, vectors.aux)


@cache
def problem_of(world: World, order: tuple[int, ...] | None = None, copies: int = 1) -> DenseProblem:
    """Return the problem of a world, its train set in another order or several times over."""
    train = world.train if order is None else take(world.train, torch.tensor(order))
    train = join([train] * copies)
    task = world.task()
    space = plain_space(task)
    rows = plain_rows(task, space, train)
    rows = evolve(rows, index=torch.arange(batch_size(train)))
    matrices: dict[CurvatureKind, Tensor] = {
        "hessian": hessian(task, space, train),
        "ggn": ggn(task, space, train),
    }
    return DenseProblem(world.name, rows, matrices, world.convex)


@cache
def curvature_worlds() -> tuple[World, ...]:
    """Return worlds with a convex loss, with a saddle, and with sequences."""
    return (logistic(), network(), language())
