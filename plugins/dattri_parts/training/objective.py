"""What training minimises: the mean of a loss over a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dattri_core import (
    InputError,
    Loss,
    batch_size,
    causal_lm,
    cross_entropy,
    labels_of,
    nearest,
    squared_error,
    token_cross_entropy,
)

LOSSES: dict[str, Loss] = {
    loss.name: loss for loss in (cross_entropy, squared_error, causal_lm, token_cross_entropy)
}
SHIFTS = {causal_lm.name: 1, token_cross_entropy.name: 0}
"""Losses of a label for each token, and how far it stands after what predicts it."""
IGNORED = -100
"""Label of a token that is not predicted."""


def loss_named(name: str) -> Loss:
    """Return a shipped loss.

    Raises:
        InputError: There is none of that name.
    """
    if name not in LOSSES:
        raise InputError(f"retraining: no loss named {name!r}; {nearest(name, LOSSES)}")
    return LOSSES[name]


def loss_of(given: Any) -> Loss:
    """Return a loss: a shipped one by name or as it is, or one's own.

    Args:
        given: A name; a `Loss`, whose forward calls the model and nothing else of it; or a function
            ``(model, batch) -> [B]``.

    Raises:
        InputError: It is none of these, or one's own has the name of a shipped one.
    """
    if isinstance(given, str):
        return loss_named(given)
    if isinstance(given, Loss):
        if given.name in LOSSES and given != LOSSES[given.name]:
            raise InputError(
                f"retraining: a Loss of your own is named {given.name!r}, as a shipped one is, "
                "which is averaged and measured in its own way; give yours another name"
            )
        return given
    if not callable(given):
        raise InputError(
            f"retraining: the loss is {given!r} ({type(given).__name__}), expected one of "
            f"{sorted(LOSSES)}, a dattri.Loss or a function (model, batch) -> [B]"
        )
    return Loss(given, _as_they_are, getattr(given, "__name__", type(given).__name__))


def is_shipped(loss: Loss) -> bool:
    """Return whether a loss is one of this package, known by its name."""
    return loss.name in LOSSES


def _as_they_are(losses: Tensor, batch: Any) -> Tensor:
    return losses


def mean_loss(loss: Loss, model: Callable[..., Any], batch: Any) -> Tensor:
    """Return the mean loss of a batch: over its examples, or the tokens that are predicted in it.

    Args:
        loss: A shipped loss, or one's own.
        model: A module, or a function that is called as one.
        batch: A nest of tensors, labels last.
    """
    values = loss(model, batch)  # type: ignore[arg-type]
    if loss.name in SHIFTS:
        return values.sum() / torch.clamp_min(_predicted(loss, batch), 1)
    return values.mean()


def scale_of(loss: Loss, batch: Any) -> float:
    """Return `mean_loss` over the mean of the loss over examples, one number for a batch."""
    if loss.name not in SHIFTS:
        return 1.0
    return batch_size(batch) / max(1, int(_predicted(loss, batch)))


def _predicted(loss: Loss, batch: Any) -> Tensor:
    """Return the number of tokens that are predicted in a batch."""
    return (labels_of(batch)[:, SHIFTS[loss.name] :] != IGNORED).sum()
