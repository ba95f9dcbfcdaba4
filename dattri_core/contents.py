"""What data hold, as a hash: of their tensors, and of the names and plain values around them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import TensorDataset

from dattri_core.batch import Batch, digest, tensors_of

PIECE = 16 * 2**20
"""Bytes of examples that are hashed at once; part of what a hash is, so not to be tuned."""
MOST = 256
"""Examples that are hashed at once, at most; likewise."""


def content_of(batch: Batch) -> str:
    """Return a hash of numbers, shapes and dtypes, of keys and order, and of text and the like.

    Of what is neither tensor nor array nor plain value, the type alone is seen.
    """
    state = hashlib.sha256(digest(batch).encode())
    for said in _around(batch):
        state.update(f"{len(said)}:{said}".encode("utf-8", "surrogatepass"))
    return state.hexdigest()


def piece_of(one: Batch) -> int:
    """Return how many examples to hash at once, given a batch of one."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(one))
    return max(1, min(MOST, PIECE // max(1, size)))


def tensors_behind(data: Any) -> tuple[Tensor, ...] | None:
    """Return the tensors that hold all that a data set gives, or None where they are not known."""
    return data.tensors if type(data) is TensorDataset else None  # not of a class made from it


def _around(batch: Batch) -> Iterator[str]:
    if isinstance(batch, (Tensor, np.ndarray)):
        yield "tensor"
    elif isinstance(batch, Mapping):
        yield f"mapping {len(batch)}"
        for key, value in batch.items():
            yield repr(key)
            yield from _around(value)
    elif isinstance(batch, (tuple, list)):
        yield f"sequence {len(batch)}"
        for value in batch:
            yield from _around(value)
    elif isinstance(batch, (str, bytes, int, float, complex, np.generic)) or batch is None:
        yield repr(batch)
    else:
        yield type(batch).__qualname__
