"""Per-example gradients the plain way: a loop of single-example backward passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dattri_core import Rows, batch_size, take
from dattri_core.lift import to_parameters


def loop_gradients(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, sign: float = 1.0
) -> dict[str, Tensor]:
    """Return the gradient of each example's loss, ``[B, *shape]`` by parameter, in eval mode.

    A copy of the model is differentiated, one example at a time, as a user would do it.
    """
    # In eval mode cuDNN has no backward pass of a module that recurs.
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        return _gradients(model, loss, batch, sign)


def _gradients(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, sign: float
) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {}
    for b in range(batch_size(batch)):
        single = copy.deepcopy(model).eval()
        for parameter in single.parameters():
            parameter.grad = None
        value = sign * loss(single, take(batch, slice(b, b + 1))).sum()
        if value.requires_grad:
            value.backward()
        for name, parameter in single.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            rows.setdefault(name, []).append(grad.to_dense().detach())
    return {name: torch.stack(grads) for name, grads in rows.items()}


def stream_rows(bound: Any, batch: Any, role: str = "train") -> tuple[Rows, list[str]]:
    """Return the rows of a batch, and the names of the blocks in the order they came."""
    blocks: dict[str, Any] = {}
    names: list[str] = []

    def sink(name: str, block: Any) -> None:
        assert name not in blocks, f"{name} came twice"
        blocks[name] = block
        names.append(name)

    bound.stream(batch, role, sink)
    return Rows(bound.space, blocks, torch.arange(batch_size(batch))), names


def worst_difference(
    bound: Any, expected: dict[str, Tensor], batch: Any, role: str = "train"
) -> float:
    """Return the largest absolute difference of any entry of any selected parameter."""
    rows, _ = stream_rows(bound, batch, role)
    got = to_parameters(rows)
    assert set(got) == set(bound.evaluator.selected)
    assert bound.space.covers_parameters
    worst = 0.0
    for name, values in got.items():
        assert values.shape == expected[name].shape, name
        difference = (values.to(expected[name].dtype) - expected[name]).abs().max()
        assert torch.isfinite(difference), name
        worst = max(worst, difference.item())
    return worst
