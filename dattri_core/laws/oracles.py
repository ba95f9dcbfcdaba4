"""Dense float64 oracles: loops of single examples and backward passes, and nothing clever."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor, nn

from dattri_core.batch import Batch, batch_size, take
from dattri_core.blocks import Block, DenseBlock, OuterBlock
from dattri_core.losses import FunctionalLoss, Loss
from dattri_core.protocols import Role
from dattri_core.rows import Rows
from dattri_core.space import BlockSpec, ParameterView, Space
from dattri_core.task import Task

Value: TypeAlias = Callable[[], Tensor]


def singles(batch: Batch) -> list[Batch]:
    """Return batches of one example each."""
    return [take(batch, slice(i, i + 1)) for i in range(batch_size(batch))]


def value(task: Task, batch: Batch, role: Role) -> Tensor:
    """Return the sum over the batch of the loss, or of the signed target, at the weights now."""
    if role == "test" and task.target is not None:
        return task.sign * task.target.function(task.model, batch).sum()
    if isinstance(task.loss, FunctionalLoss):
        raise TypeError("the oracle takes losses of a model, not of parameters")
    return task.loss(task.model, batch).sum()


def selected(task: Task) -> dict[str, nn.Parameter]:
    """Return the attributed parameters by name."""
    named = dict(task.model.named_parameters())
    return {name: named[name] for name in task.parameter_names}


def values_of(task: Task, batch: Batch, role: Role) -> list[Value]:
    """Return for each example a function that computes its loss, or its signed target."""
    return [partial(value, task, example, role) for example in singles(batch)]


def pulls_of(task: Task, batch: Batch, directions: Tensor) -> list[Value]:
    """Return for each example a function that computes <outputs, direction>, both ``[B, ...]``."""
    loss = task.loss
    assert isinstance(loss, Loss)

    def pulled(example: Batch, direction: Tensor) -> Tensor:
        return (loss.forward(task.model, example)[0] * direction).sum()

    pairs = zip(singles(batch), directions, strict=True)
    return [partial(pulled, example, direction) for example, direction in pairs]


def gradients(task: Task, batch: Batch, role: Role = "train") -> dict[str, Tensor]:
    """Return each example's gradient by parameter, ``[B, *shape]``: one backward pass each."""
    return gradients_of(task, values_of(task, batch, role))


def gradients_of(task: Task, values: Sequence[Value]) -> dict[str, Tensor]:
    """Return each value's gradient by parameter, ``[B, *shape]``: one backward pass each."""
    weights = selected(task)
    found: dict[str, list[Tensor]] = {name: [] for name in weights}
    for one in values:
        grads = torch.autograd.grad(one(), list(weights.values()), allow_unused=True)
        for (name, weight), grad in zip(weights.items(), grads, strict=True):
            found[name].append(torch.zeros_like(weight) if grad is None else grad)
    return {name: torch.stack(parts).detach() for name, parts in found.items()}


def place(space: Space, parameters: Mapping[str, Tensor]) -> Tensor:
    """Lay parameters ``[B, *shape]`` out as flat rows ``[B, d]`` of a space that covers them."""
    rows = []
    for spec in space:
        given = next(iter(parameters.values()))
        count = len(given)
        matrix = given.new_full((count, *spec.matrix_shape), float("nan"), dtype=torch.float64)
        for view in spec.parameters:
            part = parameters[view.parameter].reshape(count, *(view.shape or (1,)))
            part = part.flatten(2) if part.dim() > 2 else part.unsqueeze(2)
            matrix[:, :, view.start : view.stop] = part.mT if view.transposed else part
        rows.append(matrix.reshape(count, spec.size))
    return torch.cat(rows, 1)


def row_matrix(task: Task, space: Space, batch: Batch, role: Role = "train") -> Tensor:
    """Return the gradient of every example as a flat row of a space, ``[B, d]``."""
    return place(space, gradients(task, batch, role))


def hessian(task: Task, space: Space, batch: Batch) -> Tensor:
    """Return the mean Hessian of the train loss over a batch, ``[d, d]``, a backward pass a row."""
    weights = selected(task)
    mean = value(task, batch, "train") / batch_size(batch)
    first = torch.autograd.grad(mean, list(weights.values()), create_graph=True)
    flat = torch.cat([g.flatten() for g in first])
    columns: dict[str, list[Tensor]] = {name: [] for name in weights}
    for entry in flat:
        second = torch.autograd.grad(
            entry, list(weights.values()), retain_graph=True, allow_unused=True
        )
        for (name, weight), grad in zip(weights.items(), second, strict=True):
            columns[name].append(torch.zeros_like(weight) if grad is None else grad)
    return _both_sides(task, space, {k: torch.stack(v).detach() for k, v in columns.items()})


def output_hessian(task: Task, outputs: Tensor, example: Batch) -> Tensor:
    """Return the Hessian of the criterion in the outputs of one example, ``[K, K]``."""
    loss = task.loss
    assert isinstance(loss, Loss)
    free = outputs.detach().requires_grad_()
    slope = torch.autograd.grad(loss.criterion(free, example).sum(), free, create_graph=True)
    rows = [
        torch.autograd.grad(entry, free, retain_graph=True)[0].flatten()
        for entry in slope[0].flatten()
    ]
    return torch.stack(rows)


def output_columns(task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return columns f with sum f f^T the criterion's Hessian in the outputs, by eigenvectors.

    Returns:
        The example of each column ``[N]``, example after example, and the columns ``[N, ...]``.
    """
    loss = task.loss
    assert isinstance(loss, Loss)
    owners: list[int] = []
    columns: list[Tensor] = []
    for position, example in enumerate(singles(batch)):
        outputs = loss.forward(task.model, example).detach()
        values, vectors = torch.linalg.eigh(output_hessian(task, outputs, example).double())
        for entry, vector in zip(values, vectors.T, strict=True):
            if entry > 1e-13 * values[-1]:
                owners.append(position)
                columns.append(entry.sqrt() * vector.reshape(outputs.shape[1:]))
    return torch.tensor(owners), torch.stack(columns)


def ggn(task: Task, space: Space, batch: Batch) -> Tensor:
    """Return mean_b J_b^T (d2 criterion / d outputs2) J_b, ``[d, d]``, one pass an output."""
    loss = task.loss
    assert isinstance(loss, Loss)
    weights = selected(task)
    total: Tensor | None = None
    for example in singles(batch):
        outputs = loss.forward(task.model, example)
        jacobian = {name: [] for name in weights}  # type: dict[str, list[Tensor]]
        for entry in outputs.flatten():
            grads = torch.autograd.grad(
                entry, list(weights.values()), retain_graph=True, allow_unused=True
            )
            for (name, weight), grad in zip(weights.items(), grads, strict=True):
                jacobian[name].append(torch.zeros_like(weight) if grad is None else grad)
        rows = place(space, {k: torch.stack(v).detach() for k, v in jacobian.items()})
        part = rows.T @ output_hessian(task, outputs, example).double() @ rows
        total = part if total is None else total + part
    assert total is not None
    return total / batch_size(batch)


def _both_sides(task: Task, space: Space, columns: Mapping[str, Tensor]) -> Tensor:
    """Take a matrix from the order of parameters to that of a space, on both axes."""
    half = place(space, columns)  # [parameters, d]
    sizes = [weight.numel() for weight in selected(task).values()]
    shapes = [weight.shape for weight in selected(task).values()]
    parts = torch.tensor_split(half.T, list(accumulate(sizes))[:-1], dim=1)
    return place(
        space,
        {
            name: part.reshape(half.shape[1], *shape)
            for name, part, shape in zip(selected(task), parts, shapes, strict=True)
        },
    )


def plain_space(task: Task) -> Space:
    """Return a space of a task: an outer block a linear layer, a dense block a parameter else."""
    blocks: list[BlockSpec] = []
    chosen = set(task.parameter_names)
    for name, module in task.model.named_modules():
        own = {
            f"{name}.{key}" if name else key: p for key, p in module.named_parameters(recurse=False)
        }
        own = {key: p for key, p in own.items() if key in chosen}
        if isinstance(module, nn.Linear) and own:
            views, at = [], 0
            for key, weight in own.items():
                width = weight.numel() // weight.shape[0]
                views.append(ParameterView(key, tuple(weight.shape), at, at + width))
                at += width
            blocks.append(BlockSpec(name or "linear", "outer", (module.out_features, at), views))
            continue
        for key, p in own.items():
            shape = tuple(p.shape)
            width = p.numel() // shape[0]
            blocks.append(BlockSpec(key, "dense", shape, (ParameterView(key, shape, 0, width),)))
    return Space(tuple(blocks))


def plain_rows(task: Task, space: Space, batch: Batch, role: Role = "train") -> Rows:
    """Return the rows of `plain_space`, linear layers as the factors of single examples."""
    return _plain_rows(task, space, values_of(task, batch, role))


def pulled_rows(task: Task, space: Space, batch: Batch, directions: Tensor) -> Rows:
    """Return the rows J_b^T u_b of `plain_space` for directions u in the outputs, ``[B, ...]``."""
    return _plain_rows(task, space, pulls_of(task, batch, directions))


def _plain_rows(task: Task, space: Space, values: Sequence[Value]) -> Rows:
    matrix = place(space, gradients_of(task, values))
    formed = Rows.from_flat(space, matrix, torch.arange(len(values)))
    blocks: dict[str, Block] = dict(formed.blocks)
    modules = dict(task.model.named_modules())
    for spec in space:
        if spec.kind == "outer":
            layer = modules[spec.name if spec.name in modules else ""]
            parts = [_factors(layer, one) for one in values]
            outputs = torch.stack([output for output, _ in parts])
            inputs = torch.stack([x for _, x in parts])
            views = {view.parameter.rpartition(".")[2] for view in spec.parameters}
            if views == {"weight", "bias"}:
                inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
            blocks[spec.name] = OuterBlock(outputs, inputs)
            difference = (blocks[spec.name].flat() - formed.blocks[spec.name].flat()).abs().max()
            assert difference < 1e-10, (
                f"the oracle's factors of {spec.name} are off by {difference}"
            )
        else:
            blocks[spec.name] = DenseBlock(formed.blocks[spec.name].dense().values)
    return Rows(space, blocks, formed.index)


def _factors(layer: nn.Module, one: Value) -> tuple[Tensor, Tensor]:
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append((inputs[0], output))

    handle = layer.register_forward_hook(keep)
    try:
        total = one()
    finally:
        handle.remove()
    [(inputs, output)] = kept
    (gradient,) = torch.autograd.grad(total, output)
    return gradient.reshape(-1, gradient.shape[-1]), inputs.detach().reshape(-1, inputs.shape[-1])
