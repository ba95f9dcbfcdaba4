"""Pooling: one feature vector of an example out of those of its positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dattri_core import InputError, SpecError

Pooling = Literal["none", "mean", "last", "first", "max"]
POOLINGS: tuple[Pooling, ...] = ("none", "mean", "last", "first", "max")
Channels = Literal["first", "last"]
CHANNELS: tuple[Channels, ...] = ("first", "last")
MASK = "attention_mask"
"""Key of a batch under which Hugging Face says which positions are no padding, ``[B, T]``."""


def pool(features: Tensor, pooling: Pooling, channels: Channels | None, batch: Any) -> Tensor:
    """Return the features of each example, positions pooled.

    Positions are all axes but the first and that of the channels. Where the batch has an
    ``attention_mask`` of the shape of the positions, those that are padding take no part, so that
    an example has the same features however far its batch is padded.

    Args:
        features: ``[B, ...]``.
        pooling: ``"none"`` returns them as they are.
        channels: Which axis they are: the second or the last; None: the last of three axes, the
            second of more.
        batch: Whose features they are.

    Raises:
        SpecError: There are no positions.
        InputError: An example is all padding.
    """
    if pooling == "none":
        return features
    if features.dim() < 3:
        raise SpecError(
            f"source 'representation': pooling={pooling!r} of features {tuple(features.shape)}, "
            "which have no axis of positions; use pooling='none'"
        )
    if channels == "first" or (channels is None and features.dim() > 3):
        features = features.movedim(1, -1)
    places = features.flatten(1, -2)  # [B, T, D]
    known = _known(batch, features)
    if not bool(known.any(1).all()):
        raise InputError(
            f"source 'representation': pooling={pooling!r} has nothing to pool of the examples "
            f"{(~known.any(1)).nonzero().flatten().tolist()[:8]} of the batch, which are padding "
            f"only by their {MASK!r}"
        )
    return _pooled(places, known, pooling)


def _pooled(places: Tensor, known: Tensor, pooling: Pooling) -> Tensor:
    if pooling == "max":
        return places.masked_fill(~known.unsqueeze(2), -torch.inf).amax(1)
    if pooling == "mean":
        wide = torch.promote_types(places.dtype, torch.float32)
        total = places.masked_fill(~known.unsqueeze(2), 0).sum(1, dtype=wide)
        return (total / known.sum(1, keepdim=True)).to(places.dtype)
    at = known.int().argmax(1)
    if pooling == "last":
        at = known.shape[1] - 1 - known.int().flip(1).argmax(1)
    return places[torch.arange(len(places), device=places.device), at]


def _known(batch: Any, features: Tensor) -> Tensor:
    """Return which positions count, ``[B, T]``."""
    shape = features.shape[:-1]
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    if mask is not None and tuple(mask.shape) == tuple(shape):
        return torch.as_tensor(mask, device=features.device).bool().flatten(1)
    return torch.ones(shape, dtype=torch.bool, device=features.device).flatten(1)
