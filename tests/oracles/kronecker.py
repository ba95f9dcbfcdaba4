"""Dense float64 oracles of Kronecker-factored curvature: hooks, single examples, full matrices.

Axes: T positions, O and I a layer's outputs and inputs. A block's entries are ordered as (O, I).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

import dattri_core as dattri
from dattri_core import RandomStream, Space
from dattri_core.assemble import build_part
from dattri_core.laws.oracles import singles
from dattri_core.problem import TrainProblem

Row = tuple[Tensor, Tensor]  # e [T, O] and x [T, I] of one row


def problem_of(
    task: dattri.Task, train: Any, *, batch: int = 4, memory: int = 2**28, seed: int = 0
) -> TrainProblem:
    """Return the train set as curvatures see it."""
    examples = dattri.Examples.of(train, "train")
    source = build_part("source", "per-example")
    bound = source.bind(task, task.checkpoints[0], examples.sample(3))
    return TrainProblem(
        source=bound,
        examples=examples,
        maps=(),
        batch=batch,
        random=RandomStream(seed, "curvature"),
        memory=memory,
    )


# --- factors of single examples -------------------------------------------------------------------
def empirical(task: dattri.Task) -> Callable[[Any], list[Callable[[Tensor], Tensor]]]:
    """Return the one function of an example's outputs whose gradient is its loss row."""
    return lambda example: [lambda outputs: task.loss.criterion(outputs, example).sum()]


def softmax_ggn(task: dattri.Task) -> Callable[[Any], list[Callable[[Tensor], Tensor]]]:
    """Return functions whose gradients are columns of C = diag(p) - p p^T, by eigenvectors."""

    def functions(example: Any) -> list[Callable[[Tensor], Tensor]]:
        with torch.no_grad():
            p = task.loss.forward(task.model, example)[0].softmax(0)
        values, vectors = torch.linalg.eigh(torch.diag(p) - torch.outer(p, p))
        columns = [v * mu.sqrt() for mu, v in zip(values, vectors.T, strict=True) if mu > 1e-12]
        return [lambda outputs, f=f: (outputs[0] * f).sum() for f in columns]

    return functions


def factors_of(
    task: dattri.Task,
    train: Any,
    path: str,
    functions: Callable[[Any], list[Callable[[Tensor], Tensor]]],
) -> list[Row]:
    """Return e and x of every row of one module, each over all positions of all its calls."""
    module = task.model.get_submodule(path)
    rows: list[Row] = []
    for example in singles(train):
        calls: list[tuple[Tensor, Tensor]] = []

        def keep(_: nn.Module, inputs: Any, output: Tensor, calls: Any = calls) -> None:
            calls.append((inputs[0], output))

        handle = module.register_forward_hook(keep)
        try:
            outputs = task.loss.forward(task.model, example)
        finally:
            handle.remove()
        for function in functions(example):
            value = function(outputs)
            grads = torch.autograd.grad(value, [out for _, out in calls], retain_graph=True)
            parts = [_positions(module, x, g) for (x, _), g in zip(calls, grads, strict=True)]
            rows.append((torch.cat([e for e, _ in parts]), torch.cat([x for _, x in parts])))
    return rows


def _positions(module: nn.Module, inputs: Tensor, grads: Tensor) -> Row:
    if isinstance(module, nn.Embedding):
        x = nn.functional.one_hot(inputs.flatten(), module.num_embeddings).double()
        return grads.reshape(len(x), -1), x
    if isinstance(module, nn.Conv2d):
        patches = nn.functional.unfold(
            inputs, module.kernel_size, module.dilation, module.padding, module.stride
        )
        x, e = patches[0].T, grads[0].flatten(1).T
    else:
        x, e = inputs.reshape(-1, inputs.shape[-1]), grads.reshape(-1, grads.shape[-1])
    if getattr(module, "bias", None) is not None:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    return e, x.detach()


def rows_of_group(rows: Sequence[Row], group: int, groups: int, bias: bool) -> list[Row]:
    """Return e and x of one group of a grouped convolution, its outputs and its part of a patch."""
    found = []
    for e, x in rows:
        own = x[:, :-1].chunk(groups, 1)[group] if bias else x.chunk(groups, 1)[group]
        inputs = torch.cat([own, x[:, -1:]], 1) if bias else own
        found.append((e.chunk(groups, 1)[group], inputs))
    return found


# --- dense curvature ------------------------------------------------------------------------------
def gradients(rows: Sequence[Row]) -> Tensor:
    """Return the rows formed and flat, ``[R, O I]``."""
    return torch.stack([(e.T @ x).flatten() for e, x in rows])


def fisher(rows: Sequence[Row], n: int) -> Tensor:
    """Return 1/n sum g g^T, the exact block."""
    flat = gradients(rows)
    return flat.T @ flat / n


@frozen
class Factors:
    """Sums over positions that count: outputs ``[O, O]``, inputs ``[I, I]``, how many."""

    outputs: Tensor
    inputs: Tensor
    count: int


def factors(rows: Sequence[Row], *, reduce: bool = False) -> Factors:
    """Return sum e e^T and sum x x^T over positions with e x^T != 0, one at a time."""
    outputs = torch.zeros(rows[0][0].shape[1], rows[0][0].shape[1]).double()
    inputs = torch.zeros(rows[0][1].shape[1], rows[0][1].shape[1]).double()
    count = 0
    for e, x in rows:
        live = [t for t in range(len(e)) if bool((torch.outer(e[t], x[t]) != 0).any())]
        pairs = [(e[t], x[t]) for t in live]
        if reduce and live:
            pairs = [(e[live].sum(0), x[live].mean(0))]
        for one, other in pairs:
            outputs += torch.outer(one, one)
            inputs += torch.outer(other, other)
            count += 1
    return Factors(outputs, inputs, count)


def kfac(rows: Sequence[Row], n: int, *, reduce: bool = False) -> Tensor:
    """Return (sum e e^T) (x) (sum x x^T) / (n M), ``[O I, O I]``."""
    sums = factors(rows, reduce=reduce)
    return torch.kron(sums.outputs, sums.inputs) / (n * sums.count)


def ekfac(rows: Sequence[Row], n: int, *, reduce: bool = False) -> Tensor:
    """Return Q diag(1/n sum (Q^T g)^2) Q^T with Q the eigenvectors of K-FAC, ``[O I, O I]``."""
    sums = factors(rows, reduce=reduce)
    basis = torch.kron(
        torch.linalg.eigh(sums.outputs).eigenvectors, torch.linalg.eigh(sums.inputs).eigenvectors
    )
    values = (gradients(rows) @ basis).square().sum(0) / n
    return (basis * values) @ basis.T


def block_of(matrix: Tensor, space: Space, path: str) -> Tensor:
    """Return the part of a matrix over a space that belongs to the block of one module."""
    name = block_name(space, path)
    where = slice(space.offsets[name], space.offsets[name] + space[name].size)
    return matrix[where, where]


def block_name(space: Space, path: str) -> str:
    """Return the name of the block that holds the parameters of one module."""
    prefix = f"{path}." if path else ""
    (name,) = [
        spec.name
        for spec in space
        if all(view.parameter.rpartition(".")[0] == prefix.rstrip(".") for view in spec.parameters)
    ]
    return name


def block_diagonal(matrix: Tensor, space: Space) -> Tensor:
    """Return the matrix with zeros where two blocks meet."""
    kept = torch.zeros_like(matrix)
    for name in space.names:
        where = slice(space.offsets[name], space.offsets[name] + space[name].size)
        kept[where, where] = matrix[where, where]
    return kept
