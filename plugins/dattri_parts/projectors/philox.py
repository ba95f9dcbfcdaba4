"""The generator of all random matrices: Philox4x32-10, on NumPy arrays and on tensors of a device.

Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3: a 128-bit counter and a 64-bit key
give four words of 32 bits. Words live in 64-bit integers. The operators of NumPy and torch mean the
same on them, overflow included, so that one text serves both, and the bits are equal.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch

Words: TypeAlias = Any
"""64-bit integers, of NumPy or of torch, each below 2^32."""

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def counting(start: int, stop: int, device: torch.device | None) -> Words:
    """Return the integers from ``start`` below ``stop``, of NumPy where no device is given."""
    if device is None:
        return np.arange(start, stop, dtype=np.int64)
    return torch.arange(start, stop, dtype=torch.int64, device=device)


def philox(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, ...]:
    """Return four words of 32 bits for each counter of four words, ten rounds.

    Args:
        counter: Arrays or tensors that broadcast, each of numbers below 2^32.
        key: 64 bits.
    """
    first, second, third, fourth = counter
    low, high = key & LOW, key >> 32
    for _ in range(10):
        left, right = first * MULTIPLIERS[0], third * MULTIPLIERS[1]
        # A product may wrap around the sign: its high half is masked after the shift.
        first, second, third, fourth = (
            ((right >> 32) & LOW) ^ second ^ low,
            right & LOW,
            ((left >> 32) & LOW) ^ fourth ^ high,
            left & LOW,
        )
        low, high = (low + INCREMENTS[0]) & LOW, (high + INCREMENTS[1]) & LOW
    return first, second, third, fourth
