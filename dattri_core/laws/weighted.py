"""Laws of weights: in which unit a curvature and its inverse are, and over what its mean goes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import cast

import torch
from attrs import frozen
from torch import Tensor

from dattri_core.blocks import Block
from dattri_core.errors import SpecError
from dattri_core.laws.curvatures import CurvatureBench
from dattri_core.laws.inverse_numbers import CLOSE, at_damping, damped, fitted, wholes
from dattri_core.laws.inverses import InverseBench
from dattri_core.laws.law import NotApplicable, law, require, require_close
from dattri_core.laws.problems import DenseProblem, problem_of
from dattri_core.laws.worlds import N_TRAIN
from dattri_core.protocols import CurvatureKind, Damping, RandomStream, RowKind
from dattri_core.rows import Rows
from dattri_core.space import Space

FACTOR = 3.0
"""What all rows are multiplied by."""
STRENGTH = 0.7
"""Of the damping."""
LEAST = 1e-6
"""Of the squared length of train rows, what the curvature takes at least."""


@frozen(eq=False)
class WeightedProblem:
    """A `Problem` whose rows are those of another times weights, its curvature times their squares.

    It shows no model: what is read there has no weights.

    Args:
        whole: The problem.
        weights: Of its examples, ``[n]``.
        asked: Weight of the reference examples, all alike.
    """

    whole: DenseProblem
    weights: Tensor
    asked: float

    @classmethod
    def times(cls, whole: DenseProblem, factor: float) -> WeightedProblem:
        """Return a problem with one weight for all examples, those of reference too."""
        return cls(whole, torch.full((whole.n_train,), factor, dtype=torch.float64), factor)

    @property
    def space(self) -> Space:
        """Return the space of the rows."""
        return self.whole.space

    @property
    def n_train(self) -> int:
        """Return the number of examples, those of weight 0 among them."""
        return self.whole.n_train

    @property
    def device(self) -> torch.device:
        """Return where the rows are."""
        return self.whole.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the rows."""
        return self.whole.dtype

    @property
    def random(self) -> RandomStream:
        """Return the stream of the fit."""
        return self.whole.random

    @property
    def memory(self) -> int:
        """Return the bytes that a fit may use."""
        return self.whole.memory

    @property
    def reference(self) -> WeightedProblem | None:
        """Return the reference examples with their weight."""
        other = self.whole.reference
        return None if other is None else self.times(other, self.asked)

    def rows(
        self, index: Tensor | None = None, *, kind: RowKind = "loss", draw: int = 0
    ) -> Iterator[Rows]:
        """Read the rows; of kind ``"ggn"`` an example of weight 0 has none."""
        for part in self.whole.rows(index, kind=kind, draw=draw):
            weights = self.weights[part.index]
            there = weights != 0 if kind == "ggn" else torch.ones_like(weights, dtype=torch.bool)
            if bool(there.any()):
                yield part.take(there.nonzero().flatten()).scale(weights[there].to(part.dtype))

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
        """Return the mean of the weighted curvatures times every vector."""
        chosen = torch.arange(self.n_train) if index is None else index
        total = torch.zeros(len(vectors), self.space.dim, dtype=vectors.dtype)
        for weight in set(self.weights[chosen].tolist()):
            some = chosen[self.weights[chosen] == weight]
            share = weight**2 * len(some) / len(chosen)
            total = total + share * self.whole.product(vectors, kind, some).flat()
        return Rows.from_flat(self.space, total, vectors.index, vectors.aux)

    def product_each(self, vector: Rows, kind: CurvatureKind, index: Tensor) -> Rows:
        """Return the weighted curvature of each of some examples times one vector."""
        found = self.whole.product_each(vector, kind, index)
        return found.scale(self.weights[index].square().to(found.dtype))


@law("curvature")
def units_are_kept(bench: CurvatureBench) -> None:
    """H of rows times 3, and of products times 9, is 9 H: it is in the unit of a squared row."""
    for world, problem in bench.places():
        got = _matrix(bench, WeightedProblem.times(problem, FACTOR))
        want = FACTOR**2 * bench.matrix(problem)
        require_close(got, want, f"H of rows times 3 against 9 H in {world.name}")


def _of_several_rows(bench: CurvatureBench) -> str | None:
    several = "ggn-rows" in bench.part.needs
    return None if several else "it reads no kind of row of which an example has several, or none"


@law("curvature", _of_several_rows)
def examples_without_gradient_count(bench: CurvatureBench) -> None:
    """H of the data beside as many examples of loss 0 is H / 2: a mean over examples, not rows."""
    weights = torch.ones(2 * N_TRAIN, dtype=torch.float64)
    weights[N_TRAIN:] = 0.0
    for world, problem in bench.places():
        twice = problem_of(world, copies=2)
        got = _matrix(bench, WeightedProblem(twice, weights, 0.5**0.5))
        what = f"H of the data beside as many examples of loss 0, against H / 2, in {world.name}"
        require_close(got, bench.matrix(problem) / 2, what)


def _matrix(bench: CurvatureBench, problem: WeightedProblem) -> Tensor:
    """Return the curvature of weighted rows, where it is made of rows and products."""
    try:
        return bench.matrix(cast("DenseProblem", problem))
    except SpecError as error:
        raise NotApplicable(f"it is made of more than rows and products: {error}") from None


@law("inverse_hessian", fitted, damped)
def inverse_keeps_its_unit(bench: InverseBench) -> None:
    """A fitted on rows times 3, at 9 times the damping, is A / 9."""
    for world, problem in bench.places():
        rows, damping = problem.train_rows, Damping(STRENGTH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = at_damping(bench, problem, damping).apply(rows).flat()
            weighted = cast("DenseProblem", WeightedProblem.times(problem, FACTOR))
            larger = Damping(STRENGTH * FACTOR**2)
            try:
                got = at_damping(bench, weighted, larger).apply(rows).flat()
            except SpecError as error:
                raise NotApplicable(f"made of more than rows and products: {error}") from None
        what = f"9 A of rows times 3, at 9 times the damping, against A in {world.name}"
        require_close(FACTOR**2 * got, want, what, CLOSE)


@law("inverse_hessian", fitted)
def curvature_is_felt(bench: InverseBench) -> None:
    """sum_i <g_i, g_i - damping A g_i> > 0 over train rows where the loss is convex."""
    felt = False
    for world, problem, _ in wholes(bench):
        if not world.convex:
            continue
        felt, rows = True, problem.train_rows
        inverse = at_damping(bench, problem, Damping(STRENGTH))
        left = rows.flat() - STRENGTH * inverse.apply(rows).flat()
        share = float((rows.flat() * left).sum() / rows.flat().square().sum())
        require(
            share > LEAST,
            f"sum <g, g - damping A g> / sum <g, g> is {share:.3e} at damping {STRENGTH} in "
            f"{world.name}, expected more than 0: the curvature adds to the damping",
        )
    if not felt:
        raise NotApplicable("it takes no world with a convex loss, or gives rows of lower rank")
