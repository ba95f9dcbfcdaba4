"""A finished training run."""

from __future__ import annotations

from attrs import frozen
from torch import Tensor, nn

StateDict = dict[str, Tensor]


@frozen(eq=False)
class Run:
    """A finished training run: the model, and its state after some of the epochs.

    Args:
        model: With the weights at the end, in eval mode.
        epochs: After which the states were taken, the last one at the end; 0 for an optimum.
        states: One state dict for each of ``epochs``.
        learning_rates: ``learning_rates[c]`` is the rate of the step just before ``states[c]`` was
            taken; 1 for an optimum.
    """

    model: nn.Module
    epochs: tuple[int, ...]
    states: tuple[StateDict, ...]
    learning_rates: tuple[float, ...]


def copy_of(model: nn.Module) -> StateDict:
    """Return the state of a model in tensors of its own."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
