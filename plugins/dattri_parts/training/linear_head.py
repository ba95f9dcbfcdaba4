"""A model that is linear in what is trained: fixed features, and one linear layer on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from dattri_core import InputError, Loss, batch_size, squared_error, take
from dattri_parts.training.run import StateDict, copy_of

ROWS = 1024
"""Examples in a forward pass."""


@frozen(eq=False)
class LinearHead:
    """A model as outputs = W f with f = (x, 1), x the input of its last layer.

    Args:
        model: In float64 and eval mode.
        name: Of the layer.
        bias: Whether it has one; else f = x.
    """

    model: nn.Module
    name: str
    bias: bool

    @property
    def layer(self) -> nn.Linear:
        """Return the layer."""
        layer = self.model.get_submodule(self.name)
        assert isinstance(layer, nn.Linear)
        return layer

    @torch.no_grad()
    def features(self, loss: Loss, data: Any) -> Tensor:
        """Return f of every example, ``[n, d]`` in float64."""
        found: list[Tensor] = []

        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0].detach())

        handle = self.layer.register_forward_pre_hook(note)
        try:
            for start in range(0, batch_size(data), ROWS):
                loss.forward(self.model, take(data, slice(start, start + ROWS)))
        finally:
            handle.remove()
        x = torch.cat(found)
        return torch.cat([x, x.new_ones(len(x), 1)], 1) if self.bias else x

    def state(self, weights: Tensor) -> StateDict:
        """Return the model's state with other weights W, ``[O, d]``."""
        state = copy_of(self.model)
        inputs = self.layer.in_features
        state[f"{self.name}.weight".lstrip(".")] = weights[:, :inputs].clone()
        if self.bias:
            state[f"{self.name}.bias".lstrip(".")] = weights[:, inputs].clone()
        return state


def linear_head(build: Callable[[int], nn.Module], loss: Loss, sample: Any) -> LinearHead:
    """Return a model whose only trained parameters are those of its last, linear layer.

    Args:
        build: Makes the model under a seed, which only the layer's weights may depend on.
        loss: Its criterion takes the outputs of the layer.
        sample: A few examples in float64.

    Raises:
        InputError: The model is not of this kind, so that its optimum is not known to be one.
    """
    model, other = (build(seed).double().eval() for seed in (0, 1))
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    outputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda m, i, out, name=name: outputs.update({name: out}))
        for name, layer in layers
    ]
    try:
        with torch.no_grad():
            final = loss.forward(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    heads = [name for name, out in outputs.items() if torch.equal(out, final)]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {
        name: {
            f"{name}.{p}" if name else p for p, _ in model.get_submodule(name).named_parameters()
        }
        for name in heads[-1:]
    }
    if not own or next(iter(own.values())) != trained or final.dim() != 2:
        raise InputError(
            f"optimum: {type(model).__name__} trains {sorted(trained)[:8]} and its outputs "
            f"{tuple(final.shape)} are those of {heads or 'no linear layer'}; expected one "
            "nn.Linear with outputs [B, O] that is all that is trained, with everything before it "
            "frozen, for then the objective has one optimum; else train by a Recipe"
        )
    (name,) = own
    fixed = [key for key in model.state_dict() if key not in own[name]]
    moved = [k for k in fixed if not torch.equal(model.state_dict()[k], other.state_dict()[k])]
    if moved:
        raise InputError(
            f"optimum: {moved[:8]} of {type(model).__name__} are not trained and are drawn anew by "
            "each build; give a build that always makes the same features"
        )
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return LinearHead(model, name, layer.bias is not None)


def check_convex(loss: Loss) -> None:
    """Refuse a loss whose mean over examples has no linear form here.

    Raises:
        InputError: It is ``causal-lm``.
    """
    if loss.name not in ("cross-entropy", squared_error.name):
        raise InputError(
            f"optimum: the loss {loss.name!r} is trained by a Recipe; 'cross-entropy' and "
            "'squared-error' of a linear layer have an optimum"
        )
