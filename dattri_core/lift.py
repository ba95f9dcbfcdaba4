"""Rows to named parameters and back: how curvature, which knows parameters, meets blocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from dattri_core.blocks import DenseBlock
from dattri_core.errors import SpecError
from dattri_core.rows import Rows
from dattri_core.space import BlockSpec, ParameterView, Space


def to_parameters(rows: Rows) -> dict[str, Tensor]:
    """Return the rows as one tensor per parameter, views of the rows where strides allow.

    Args:
        rows: C rows of a space whose entries are parameters.

    Returns:
        By parameter name, values ``[C, *parameter shape]``.

    Raises:
        SpecError: An entry of the space belongs to no parameter, or to two.
    """
    require_parameters(rows.space)
    found: dict[str, Tensor] = {}
    for spec in rows.space:
        matrix = rows.blocks[spec.name].dense().values.reshape(len(rows), *spec.matrix_shape)
        for view in spec.parameters:
            columns = matrix[:, :, view.start : view.stop]  # [C, O, columns]
            if view.transposed:
                columns = columns.mT
            found[view.parameter] = columns.reshape(len(rows), *view.shape)
    return found


def from_parameters(space: Space, values: Mapping[str, Tensor], index: Tensor) -> Rows:
    """Return the rows that `to_parameters` takes apart.

    Args:
        space: Whose entries are parameters.
        values: By parameter name, ``[C, *parameter shape]``; names that it does not have are left.
        index: Positions of the rows, ``[C]``.

    Raises:
        SpecError: An entry of the space belongs to no parameter, to two, or to none of the values.
    """
    require_parameters(space)
    lacking = [v.parameter for spec in space for v in spec.parameters if v.parameter not in values]
    if lacking:
        raise SpecError(
            f"rows from parameters: no values of {lacking[:8]}; give all parameters of the space"
        )
    blocks = {}
    for spec in space:
        columns = []
        for view in _ordered(spec):
            sides = (spec.matrix_shape[0], view.stop - view.start)
            given = values[view.parameter]
            if view.transposed:
                columns.append(given.reshape(len(index), *reversed(sides)).mT)
            else:
                columns.append(given.reshape(len(index), *sides))
        blocks[spec.name] = DenseBlock(torch.cat(columns, 2).reshape(len(index), *spec.shape))
    return Rows(space, blocks, index)


def empty_rows(space: Space, like: Mapping[str, Tensor], index: Tensor) -> Rows:
    """Return rows of a space to be filled through their `to_parameters`, which are views of them.

    Args:
        space: A space whose entries are parameters.
        like: By parameter name, tensors that show the dtype and device.
        index: Positions of the rows in the data set, ``[C]``.
    """
    require_parameters(space)
    first = next(iter(like.values()))
    blocks = {spec.name: DenseBlock(first.new_empty(len(index), *spec.shape)) for spec in space}
    return Rows(space, blocks, index)


def _ordered(spec: BlockSpec) -> list[ParameterView]:
    return sorted(spec.parameters, key=lambda view: view.start)


@lru_cache(maxsize=64)
def require_parameters(space: Space) -> None:
    """Raise `SpecError` unless every entry of a row is exactly one entry of one parameter."""
    if not space.covers_parameters:
        bare = [
            spec.name
            for spec in space
            if sum(v.stop - v.start for v in spec.parameters) != spec.matrix_shape[1]
        ]
        raise SpecError(
            f"rows as parameters: the blocks {bare} are not made of parameters (features, or rows "
            "after a projector); a Hessian or a GGN needs rows that are gradients in the "
            "parameters: use the source 'per-example' or 'functional', and a projector that gives "
            "an adjoint"
        )
    seen: dict[str, str] = {}
    for spec in space:
        reached = 0
        for view in _ordered(spec):
            if view.start != reached or spec.matrix_shape[0] * (view.stop - view.start) != (
                torch.Size(view.shape).numel()
            ):
                raise SpecError(
                    f"block {spec.name!r}: parameter {view.parameter!r} of shape {view.shape} "
                    f"cannot fill columns {view.start}:{view.stop} of {spec.matrix_shape}; views "
                    "must tile the columns without a gap"
                )
            reached = view.stop
            if view.parameter in seen:
                raise SpecError(
                    f"rows as parameters: {view.parameter!r} lies in the blocks "
                    f"{seen[view.parameter]!r} and {spec.name!r}; a shared parameter has one block"
                )
            seen[view.parameter] = spec.name
