"""What every training and every measurement would fail on, seen before the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dattri_core import InputError, Loss, batch_size, cross_entropy, labels_of, take


@torch.no_grad()
def rehearse(loss: Loss, model: nn.Module, train_data: Any, test_data: Any) -> int:
    """Run a new model on two examples of each side; return how many outputs a test example has.

    Args:
        loss: One of the shipped losses.
        model: In eval mode.
        train_data: A nest of tensors in the model's precision, labels last.
        test_data: The same for the test set.

    Raises:
        InputError: Labels are no classes of the outputs, or the loss is not one number for each
            example.
    """
    for name, data in (("train_data", train_data), ("test_data", test_data)):
        batch = take(data, slice(0, 2))
        outputs = loss.forward(model, batch)
        if loss.name == cross_entropy.name:
            _check_classes(name, labels_of(data), outputs)
        got = f"outputs {tuple(outputs.shape)} and labels {tuple(labels_of(batch).shape)} of {name}"
        try:
            values = loss.criterion(outputs, batch)
        except (RuntimeError, IndexError, ValueError) as error:
            raise InputError(
                f"retraining: the loss {loss.name!r} cannot take {got}: {error}"
            ) from error
        if values.shape != (batch_size(batch),):
            raise InputError(
                f"retraining: the loss {loss.name!r} of {got} has shape {tuple(values.shape)}; "
                "expected one number for each example"
            )
    return outputs.numel() // batch_size(batch)


def _check_classes(name: str, labels: Tensor, outputs: Tensor) -> None:
    if labels.is_floating_point():  # shares of the classes
        return
    low, high = int(labels.min()), int(labels.max())
    if outputs.dim() != 2 or low < 0 or high >= outputs.shape[1]:
        raise InputError(
            f"retraining: labels of {name} go from {low} to {high} for outputs of shape "
            f"{tuple(outputs.shape)}; expected outputs [B, classes] and labels of 0 to classes - 1"
        )
