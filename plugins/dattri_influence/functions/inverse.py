"""The Hessian of a function as an operator, and its inverse by any solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import define, field, frozen
from dattri_parts.curvatures.hessian import Hessian
from torch import Tensor

from dattri_core import (
    CurvatureKind,
    Damping,
    DenseBlock,
    InputError,
    Inverse,
    RandomStream,
    Rows,
    Solver,
    Space,
    as_damping,
    free_bytes,
    map_tensors,
)
from dattri_influence.functions.layout import Layout
from dattri_influence.functions.point import Argnums, Function, Point, Transpose, held, products

SHARE = 2
"""Work may use one part in so many of the memory that is free."""


@frozen(eq=False)
class InverseProduct:
    """v -> (H + damping I)^-1 v at one point; a value to call.

    Args:
        layout: Of the arguments that H is of.
        inverse: The fitted inverse.
    """

    layout: Layout
    inverse: Inverse

    def __call__(self, vectors: Any) -> Any:
        """Return (H + damping I)^-1 v, for one vector or C of them, ``[C, *shape]``."""
        rows, many = self.layout.rows(vectors, "inverse-Hessian-vector product")
        return self.layout.nest_of(self.inverse.apply(rows), many)

    @property
    def stats(self) -> Mapping[str, float]:
        """Return what the solver reports of its last work: iterations, residual, damping..."""
        return self.inverse.stats

    def with_damping(self, damping: Damping | float | Mapping[str, float]) -> InverseProduct:
        """Return the product at another damping; what was learnt of H is used again."""
        return InverseProduct(self.layout, self.inverse.with_damping(as_damping(damping)))


def invert(
    solver: Solver,
    function: Function,
    arguments: Sequence[Any],
    argnums: Argnums,
    *,
    in_dims: Sequence[int | None] | None = None,
    seed: int = 0,
) -> InverseProduct:
    """Return the inverse of the Hessian of a function by a solver.

    Args:
        solver: Any that takes the operator of the curvature ``"hessian"``.
        function: Returns one number.
        arguments: Where.
        argnums: The arguments that H is of.
        in_dims: For solvers that sample: the axis of examples of each argument, or None.
        seed: Of what the solver draws.
    """
    problem: Any = _PointProblem(Point.of(function, held(arguments), argnums), in_dims, seed)
    operator = Hessian().fit(problem)
    return InverseProduct(problem.point.layout, solver.solve_for(operator, problem.device))


@define(eq=False)
class _PointProblem:
    """What the curvature of products asks of a `Problem`, for one function instead of a train set.

    An example is a position on the axes that ``in_dims`` names.
    """

    point: Point
    in_dims: Sequence[int | None] | None
    seed: int
    _transpose: Transpose | None = field(default=None, init=False)

    @property
    def space(self) -> Space:
        return self.point.layout.space

    @property
    def dtype(self) -> torch.dtype:
        return self.point.layout.dtype

    @property
    def device(self) -> torch.device:
        return self.point.layout.device

    @property
    def memory(self) -> int:
        return free_bytes(self.device) // SHARE

    @property
    def random(self) -> RandomStream:
        return RandomStream(self.seed, "function")

    @property
    def n_train(self) -> int:
        sizes: set[int] = set()
        for argument, axis in self._sliced():
            sizes |= {shape[axis] for shape in _shapes(argument)}
        if len(sizes) != 1:
            raise InputError(
                f"in_dims {self.in_dims!r}: the arguments have {sorted(sizes) or 'no'} examples; "
                "expected one number for all axes that it names"
            )
        return sizes.pop()

    def product(self, vectors: Rows, kind: CurvatureKind, index: Tensor | None = None) -> Rows:
        """Return H v for every vector; with ``index`` of the function of these examples alone."""
        if index is not None:
            transpose = self.point.with_arguments(self._take(index)).transpose()
        else:
            self._transpose = transpose = self._transpose or self.point.transpose()
        values = tuple(vectors.blocks[name].dense().values for name in self.space.names)
        found = products(transpose, values, many=True)
        blocks = {n: DenseBlock(value) for n, value in zip(self.space.names, found, strict=True)}
        return Rows(self.space, blocks, vectors.index, vectors.aux)

    def _sliced(self) -> list[tuple[Any, int]]:
        arguments, chosen = self.point.arguments, self.point.argnums
        axes = tuple(self.in_dims or ())
        fixed = (chosen,) if isinstance(chosen, int) else tuple(chosen)
        if len(axes) != len(arguments) or any(axes[position] is not None for position in fixed):
            raise InputError(
                f"in_dims: got {self.in_dims!r} for {len(arguments)} arguments; expected an axis "
                "of examples or None for each argument, and None for those that the function is "
                f"differentiated by: argnums {chosen!r}"
            )
        return [(a, axis) for a, axis in zip(arguments, axes, strict=True) if axis is not None]

    def _take(self, index: Tensor) -> tuple[Any, ...]:
        assert self.in_dims is not None
        taken = []
        for argument, axis in zip(self.point.arguments, self.in_dims, strict=True):
            taken.append(argument if axis is None else _chosen(argument, axis, index))
        return tuple(taken)


def _chosen(argument: Any, axis: int, index: Tensor) -> Any:
    return map_tensors(lambda t: t.index_select(axis, index.to(t.device)), argument)


def _shapes(argument: Any) -> list[torch.Size]:
    found: list[torch.Size] = []
    map_tensors(lambda tensor: found.append(tensor.shape), argument)
    return found
