"""Moments of Adam laid out as the blocks of a row are, and the space of rows made with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import (
    Block,
    BlockSpec,
    BoundSource,
    Checkpoint,
    DataSource,
    DenseBlock,
    EnsembleSource,
    Evaluator,
    NumericsError,
    ParameterMoments,
    ParameterView,
    Source,
    Space,
    SpecError,
    Task,
)


@frozen(eq=False)
class Bindings:
    """An inner source at a checkpoint, and what Adam holds of the parameters of its rows.

    Args:
        inner: Its rows are gradients of parameters.
        evaluator: Of the inner source.
        moments: By parameter name.
    """

    inner: BoundSource
    evaluator: Evaluator
    moments: Mapping[str, ParameterMoments]


def require_single(name: str, source: Source) -> None:
    """Raise `SpecError` where a source makes several networks, or is fitted on the train set."""
    if isinstance(source, EnsembleSource):
        raise SpecError(
            f"{name}: source is an ensemble, which goes around it: "
            f'{{"name": "dropout-ensemble", "source": "{name}"}}'
        )
    if isinstance(source, DataSource):
        raise SpecError(
            f"{name}: source is fitted on the train set, and its rows are not gradients at the "
            "weights that Adam updated; use the source 'per-example' or 'functional' inside of it"
        )


def bind_inner(
    name: str, source: Source, task: Task, checkpoint: Checkpoint, sample: Any
) -> Bindings:
    """Return the inner source at a checkpoint with the moments of the parameters of its rows.

    Raises:
        SpecError: The checkpoint knows no optimiser, or the rows are no gradients of parameters.
        InputError, StoreError, NumericsError: As of `AdamState.load`.
    """
    if checkpoint.optimiser is None:
        raise SpecError(
            f"source {name!r}: the checkpoint {checkpoint.name!r} has no state of the optimiser; "
            "give Task(..., optimisers=[...]), an AdamState.of(optimizer, model) or the path of a "
            "file for each checkpoint"
        )
    inner = source.bind(task, checkpoint, sample)
    evaluator = getattr(inner, "evaluator", None)
    if not isinstance(evaluator, Evaluator) or not inner.space.covers_parameters:
        raise SpecError(
            f"source {name!r}: the rows of {type(source).__name__} are not gradients of "
            "parameters, of which alone the optimiser has moments; use the source 'per-example' "
            "or 'functional' inside of it"
        )
    moments = checkpoint.optimiser.load(task.model, inner.space.parameter_names)
    return Bindings(inner, evaluator, moments)


def plain_space(space: Space) -> Space:
    """Return the space of formed rows of the same shapes that are no gradients of parameters.

    With no parameters in it a product with a Hessian or a GGN is refused, and without factors so
    is what asks for them.
    """
    return Space(tuple(BlockSpec(spec.name, "dense", spec.shape) for spec in space))


def matrices_of(
    bindings: Bindings, number: Callable[[ParameterMoments], Tensor | float]
) -> dict[str, Tensor]:
    """Return a number of every parameter entry, laid out as the matrix view of a block is.

    Args:
        bindings: Of the inner source.
        number: Of one parameter: a tensor of its shape, or one number for all of its entries.

    Returns:
        By block name ``[O, columns]``, or ``[1, columns]`` of single numbers, on the device of the
        rows, in their dtype and in float32 at least: squares of small numbers are smaller.
    """
    dtype = torch.promote_types(bindings.evaluator.dtype, torch.float32)
    device = bindings.evaluator.device

    def columns(rows: int, view: ParameterView) -> Tensor:
        count = view.stop - view.start
        value = number(bindings.moments[view.parameter])
        if not isinstance(value, Tensor):
            return torch.full((1, count), value, dtype=dtype, device=device)
        value = value.to(device=device, dtype=dtype)
        return value.reshape(count, rows).mT if view.transposed else value.reshape(rows, count)

    found: dict[str, Tensor] = {}
    for spec in bindings.inner.space:
        views = sorted(spec.parameters, key=lambda view: view.start)
        found[spec.name] = torch.cat([columns(spec.matrix_shape[0], view) for view in views], 1)
    return found


def formed(block: Block, spec: BlockSpec) -> Tensor:
    """Return the formed rows of a block in its matrix view, ``[B, O, columns]``."""
    values = block.dense().values
    return values.reshape(len(values), *spec.matrix_shape)


def as_block(values: Tensor, spec: BlockSpec, dtype: torch.dtype) -> DenseBlock:
    """Return the rows ``[B, O, columns]`` of a matrix view as a block, in the dtype of rows."""
    return DenseBlock(values.reshape(len(values), *spec.shape).to(dtype))


def require_positive(name: str, checkpoint: Checkpoint, roots: Mapping[str, Tensor]) -> None:
    """Raise `NumericsError` where a root of a second moment is zero, by which rows are divided."""
    zero = [block for block, root in roots.items() if not bool((root > 0).all())]
    if zero:
        raise NumericsError(
            f"source {name!r}: entries of the second moments of {zero[:6]} are zero at checkpoint "
            f"{checkpoint.name!r}, and so is the epsilon of the optimiser; rows cannot be divided "
            "by their root: leave these parameters out with Task(..., parameters=...)"
        )


def bytes_of(*matrices: Mapping[str, Tensor]) -> int:
    """Return the bytes of matrices by block."""
    each = (matrix for found in matrices for matrix in found.values())
    return sum(matrix.numel() * matrix.element_size() for matrix in each)
