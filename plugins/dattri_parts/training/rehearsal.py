"""What every training and every measurement would fail on, seen before the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dattri_core import InputError, Loss, batch_size, cross_entropy, labels_of, take
from dattri_parts.training.objective import is_shipped


@torch.no_grad()
def rehearse(loss: Loss, model: Callable[..., Any], train_data: Any, test_data: Any) -> int:
    """Run a new model on two examples of each side; return how many outputs a test example has.

    Args:
        loss: A shipped loss, or one's own.
        model: In eval mode, or a function that is called as one.
        train_data: A nest of tensors in the model's precision, labels last.
        test_data: The same for the test set.

    Raises:
        InputError: Labels are no classes of the outputs, the loss is not one number for each
            example, or it asks the model for more than its outputs.
    """
    for name, data in (("train_data", train_data), ("test_data", test_data)):
        batch = take(data, slice(0, 2))
        outputs = _outputs(loss, model, batch)
        got = f"outputs {tuple(outputs.shape)} of {name}"
        if is_shipped(loss):
            labels = tuple(labels_of(batch).shape)
            got = f"outputs {tuple(outputs.shape)} and labels {labels} of {name}"
        if loss.name == cross_entropy.name:
            _check_classes(name, labels_of(data), outputs)
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


def _outputs(loss: Loss, model: Callable[..., Any], batch: Any) -> Tensor:
    try:
        outputs: Any = loss.forward(model, batch)  # type: ignore[arg-type]
    except AttributeError as error:
        if "'function' object" not in str(error):
            raise
        raise InputError(
            f"retraining: the loss {loss.name!r} asks the model for more than its outputs "
            f"({error}); a model that is trained again is called with weights from outside, so "
            "move what it needs into the model's forward"
        ) from error
    if not isinstance(outputs, Tensor):
        raise InputError(
            f"retraining: the loss {loss.name!r} gave a {type(outputs).__name__}, expected a "
            "tensor that begins with the examples"
        )
    return outputs


def _check_classes(name: str, labels: Tensor, outputs: Tensor) -> None:
    if labels.is_floating_point():  # shares of the classes
        return
    low, high = int(labels.min()), int(labels.max())
    if outputs.dim() != 2 or low < 0 or high >= outputs.shape[1]:
        raise InputError(
            f"retraining: labels of {name} go from {low} to {high} for outputs of shape "
            f"{tuple(outputs.shape)}; expected outputs [B, classes] and labels of 0 to classes - 1"
        )
