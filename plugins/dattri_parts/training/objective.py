"""What training minimises: the mean of a shipped loss over a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dattri_core import (
    InputError,
    Loss,
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


def mean_loss(loss: Loss, model: Callable[..., Any], batch: Any) -> Tensor:
    """Return the mean loss of a batch: over its examples, or the tokens that are predicted in it.

    Args:
        loss: One of the shipped losses.
        model: A module, or a function that is called as one.
        batch: A nest of tensors, labels last.
    """
    values = loss(model, batch)  # type: ignore[arg-type]
    if loss.name in SHIFTS:
        predicted = (labels_of(batch)[:, SHIFTS[loss.name] :] != IGNORED).sum()
        return values.sum() / torch.clamp_min(predicted, 1)
    return values.mean()
