"""Weights that a model holds at several places, and modules that it holds under several names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from torch import Tensor, nn


def at_every_place(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is to take the place of weights and buffers, at each of their places once.

    It is for `torch.func.functional_call` with ``tie_weights=False``. That function ties by names,
    and a module that is held under two of them has each of its tensors replaced twice: the second
    time it takes the replacement for the module's own, and leaves it in the model.

    Args:
        model: As it is called.
        state: By any of the names that a tensor of the model has.

    Returns:
        By one name of each module that holds a tensor of the state. What the model does not have is
        under the name that it came with.
    """
    named = dict(
        chain(
            model.named_parameters(remove_duplicate=False),
            model.named_buffers(remove_duplicate=False),
        )
    )
    tied = {id(named[name]): value for name, value in state.items() if name in named}
    placed = {name: value for name, value in state.items() if name not in named}
    for name, tensor in _places(model):
        if id(tensor) in tied:
            placed[name] = state.get(name, tied[id(tensor)])
    return placed


def _places(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every place of a tensor; a module's places under the first of its names."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for local, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                yield prefix + local, tensor
