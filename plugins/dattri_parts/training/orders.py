"""In which order a training reads its examples, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

Order = Literal["own", "shared"]


def orders(index: Tensor, seed: int, whole: int | None = None) -> Iterator[Tensor]:
    """Yield the order of the examples of each epoch, ``[k]``, a function of the seed alone.

    Args:
        index: Positions of the examples, rising, ``[k]``.
        seed: Of the training.
        whole: Examples of the whole train set, whose order is drawn; the last ones then take the
            places of those that are left out, so that all others stay in their batch. None: the
            order of these examples alone is drawn. Of the whole set both are the same.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    if whole is None:
        while True:
            yield index[torch.randperm(len(index), generator=generator)]
    there = torch.zeros(whole, dtype=torch.bool)
    there[index] = True
    while True:
        order = torch.randperm(whole, generator=generator)
        first, last = order[: len(index)], order[len(index) :]
        first[~there[first]] = last[there[last]]
        yield first
