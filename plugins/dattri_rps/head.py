"""The last layer of a model: which one it is, and the one that takes its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import define
from torch import Tensor, nn
from torch.nn.functional import linear

from dattri_core import Evaluator, Loss, SpecError, batch_size


@define(eq=False)
class Head:
    """Takes the place of a layer, as a forward hook: outputs W f in float64 with f = (x, 1).

    Args:
        weight: W, ``[O, I + 1]``, or ``[O, I]`` of a layer without bias.
        bias: Whether the layer has one.
        features: f of the last pass, ``[B, ..., I + 1]``.
        outputs: W f of the last pass, ``[B, ..., O]``; a leaf while autograd is on.
    """

    weight: Tensor
    bias: bool
    features: Tensor | None = None
    outputs: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Return what the layer gives instead."""
        (inputs,) = args
        with torch.no_grad():
            self.features = augmented(inputs, self.bias)
            outputs = linear(self.features, self.weight)
        self.outputs = outputs.requires_grad_(torch.is_grad_enabled())
        return self.outputs

    def seen(self) -> tuple[Tensor, Tensor]:
        """Return features and outputs of the last pass, and forget them."""
        assert self.features is not None
        assert self.outputs is not None
        features, outputs = self.features, self.outputs
        self.features = self.outputs = None
        return features, outputs


def augmented(inputs: Tensor, bias: bool) -> Tensor:
    """Return f = (x, 1), or x where there is no bias, in float64."""
    features = inputs.detach().double()
    if not bias:
        return features
    return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], -1)


def find_head(evaluator: Evaluator, loss: Loss, sample: Any) -> tuple[str, nn.Linear]:
    """Return the linear layer whose outputs are those that the criterion takes.

    Args:
        evaluator: Of the user's network.
        loss: Its outputs and criterion apart.
        sample: A few examples, on the device.

    Raises:
        SpecError: There is none, it is called more than once, or its first axis does not count
            examples.
    """
    model = evaluator.task.model
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    calls: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: calls.append((name, output)) if args else None

    handles = [module.register_forward_hook(note(name)) for name, module in layers.items()]
    try:
        with evaluator.session(), torch.no_grad():
            outputs = evaluator.outputs(None, sample)
    finally:
        for handle in handles:
            handle.remove()
    equal = [name for name, output in calls if torch.equal(output, outputs)]
    if not equal:
        raise SpecError(
            f"source 'last-layer': the outputs {tuple(outputs.shape)} that the criterion of the "
            f"loss {loss.name!r} takes are those of none of the linear layers {list(layers)} of "
            f"{type(model).__name__}; give dattri.Loss(forward=..., criterion=...) whose forward "
            "returns what its last nn.Linear does, and what comes after it in the criterion"
        )
    name = equal[-1]
    times = sum(called == name for called, _ in calls)
    if times > 1 or len(outputs) != batch_size(sample):
        raise SpecError(
            f"source 'last-layer': the layer {name!r} runs {times} times for {batch_size(sample)} "
            f"examples with outputs {tuple(outputs.shape)}; expected one call whose first axis "
            "counts examples; use the source 'per-example'"
        )
    return name, layers[name]
