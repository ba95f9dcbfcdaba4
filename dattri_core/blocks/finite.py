"""Whether all numbers are finite, at the price of adding them up."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """Return whether every number is finite.

    A sum is finite only if all its terms are, and is read without a tensor of truth values; one
    that overflows is looked at term by term.
    """
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
