"""The gradient of any one module, by torch.func, for a module that has no layer rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import define, frozen
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from dattri_core import Block, DenseBlock, is_out_of_memory
from dattri_parts.sources.axes import Axis, CallLayout
from dattri_parts.sources.nest import pull, push

FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
"""What operations raise where they do not take an example by itself."""


class _Inside(nn.Module):
    """Runs a module's ``forward`` without the hooks around it, so that weights can be swapped."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, args: Any, kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


@frozen(eq=False)
class ModuleCall:
    """One call of a module as it was captured, with the gradient at its outputs."""

    inputs: Sequence[Tensor]
    skeleton: Any  # (args, kwargs) with slots
    grads: Sequence[Tensor | None]
    layout: CallLayout
    count: int  # examples B


class RepeatError(Exception):
    """A module cannot be run again for one example."""

    def __init__(self, module: nn.Module, error: Exception) -> None:
        super().__init__(str(error).strip().partition("\n")[0])
        self.module = module


@define(eq=False)
class Fallback:
    """For parameters p of one module y = f(p, x): (dy/dp)^T g for each example, formed.

    Examples run side by side under ``vmap``; where an operation of the module refuses that (a
    recurrent network), they run one after another from then on.
    """

    module: nn.Module
    side_by_side: bool = True

    def rows(self, call: ModuleCall, trained: Mapping[str, str]) -> dict[str, Block]:
        """Return a dense block for each local parameter name.

        Raises:
            RepeatError: The module cannot be run for one example: it is given something beside
                tensors with an axis of examples that tells how many there are.
        """
        chosen = [
            at
            for at, grad in enumerate(call.grads)
            if grad is not None and (call.layout.outputs[at] or call.layout.spreads[at])
        ]
        parameters = {local: _swapped_in(self.module, local) for local in trained}
        if not chosen:
            return {
                local: DenseBlock(p.new_zeros(()).expand(call.count, *p.shape))
                for local, p in parameters.items()
            }
        if self.side_by_side:
            try:
                return _dense(self._together(call, parameters, chosen))
            except FAILURES as error:
                if is_out_of_memory(error):
                    raise
                self.side_by_side = False
        try:
            return _dense(self._in_turn(call, parameters, chosen))
        except FAILURES as error:
            if is_out_of_memory(error):
                raise
            raise RepeatError(self.module, error) from error

    def _together(
        self, call: ModuleCall, parameters: dict[str, Tensor], chosen: list[int]
    ) -> dict[str, Tensor]:
        inputs, input_axes = _split(call.inputs, call.layout.inputs, call.count)
        grads, grad_axes = _gradients(call, chosen)

        def one(inputs: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
            def run(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
                return self._run(given, inputs, call.skeleton, chosen)

            outputs, pull_back, *_ = vjp(run, parameters)
            given = tuple(
                g.reshape(y.shape).to(y.dtype) for g, y in zip(grads, outputs, strict=True)
            )
            found: dict[str, Tensor] = pull_back(given)[0]
            return found

        rows: dict[str, Tensor] = vmap(one, in_dims=(input_axes, grad_axes))(inputs, grads)
        return rows

    def _in_turn(
        self, call: ModuleCall, parameters: dict[str, Tensor], chosen: list[int]
    ) -> dict[str, Tensor]:
        inputs, input_axes = _split(call.inputs, call.layout.inputs, call.count)
        grads, grad_axes = _gradients(call, chosen)
        rows: list[list[Tensor]] = []
        for b in range(call.count):
            mine = [
                x if at is None else x.select(at, b)
                for x, at in zip(inputs, input_axes, strict=True)
            ]
            given = {name: p.detach().requires_grad_() for name, p in parameters.items()}
            with torch.enable_grad():
                outputs = self._run(given, mine, call.skeleton, chosen)
                pairs = [
                    (y, g.select(at, b).reshape(y.shape).to(y.dtype))
                    for y, g, at in zip(outputs, grads, grad_axes, strict=True)
                    if y.requires_grad
                ]
            found = (
                torch.autograd.grad(
                    [y for y, _ in pairs],
                    list(given.values()),
                    [g for _, g in pairs],
                    allow_unused=True,
                )
                if pairs
                else [None] * len(given)
            )
            rows.append(
                [
                    torch.zeros_like(p) if g is None else g
                    for p, g in zip(given.values(), found, strict=True)
                ]
            )
        return {
            name: torch.stack([row[at] for row in rows]).detach()
            for at, name in enumerate(parameters)
        }

    def _run(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        skeleton: Any,
        chosen: list[int],
    ) -> tuple[Tensor, ...]:
        # Cloned, since a module may write into what it is given.
        args, kwargs = push(skeleton, [x.clone() for x in inputs])
        swapped = {f"module.{name}": value for name, value in parameters.items()}
        # Not tied: another place of the same weight has its own part of the gradient.
        result = functional_call(_Inside(self.module), swapped, (args, kwargs), tie_weights=False)
        outputs, _ = pull(result)
        return tuple(outputs[at] for at in chosen)


def _dense(found: Mapping[str, Tensor]) -> dict[str, Block]:
    """Return formed rows; those of a bag with ``sparse=True`` come as indices and values."""
    return {
        local: DenseBlock(values.to_dense() if values.is_sparse else values)
        for local, values in found.items()
    }


def _swapped_in(module: nn.Module, local: str) -> Tensor:
    """Return the tensor in the place of a parameter: the weight of the checkpoint."""
    value: Any = module
    for name in local.split("."):
        value = getattr(value, name)
    weight: Tensor = value.detach()
    return weight


def _split(
    tensors: Sequence[Tensor], axes: Sequence[Axis | None], count: int
) -> tuple[list[Tensor], list[int | None]]:
    """Cut the axis of examples out; what is left of it, k, stays where it was."""
    parts: list[Tensor] = []
    examples: list[int | None] = []
    for tensor, axis in zip(tensors, axes, strict=True):
        part, at = (tensor, None) if axis is None else axis.split(tensor, count)
        parts.append(part)
        examples.append(at)
    return parts, examples


def _gradients(call: ModuleCall, chosen: list[int]) -> tuple[list[Tensor], list[int]]:
    grads: list[Tensor] = []
    examples: list[int] = []
    for at in chosen:
        grad, axis = call.grads[at], call.layout.outputs[at]
        assert grad is not None
        if axis is None:
            spread = call.layout.spreads[at]
            assert spread is not None
            part, where = spread.lead(grad), 0
        else:
            part, where = axis.split(grad, call.count)
        grads.append(part)
        examples.append(where)
    return grads, examples
