"""Batches of any nest: a tensor, a tuple, a dict, or any nest of them; other leaves pass."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dattri_core.errors import InputError

Batch = Any
HASH_PIECE = 2**20
"""Bytes that one core hashes at a time; part of what a hash is, so not to be tuned."""


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """Apply a function to every tensor of a nest; the nest keeps its types where it can."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, np.ndarray):
        return function(torch.as_tensor(batch))
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return the tensors of a nest in order."""
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return found


def batch_size(batch: Batch) -> int:
    """Return the number of examples: the common length of the first axis of all tensors."""
    tensors = tensors_of(batch)
    if not tensors:
        raise InputError(
            f"batch: no tensor in a {type(batch).__name__}; give tensors, tuples or dicts of them"
        )
    shapes = [tuple(t.shape) for t in tensors]
    if any(not shape for shape in shapes):
        raise InputError(f"batch: a tensor has no axis of examples; shapes: {shapes}")
    sizes = {shape[0] for shape in shapes}
    if len(sizes) > 1:
        raise InputError(
            f"batch: tensors disagree on the number of examples; shapes: {shapes}; "
            "every tensor's first axis must count examples"
        )
    return int(sizes.pop())


def take(batch: Batch, index: slice | Tensor) -> Batch:
    """Return the chosen examples."""
    return map_tensors(
        lambda t: t[index.to(t.device) if isinstance(index, Tensor) else index], batch
    )


def move(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on a device; floating point dtypes are left alone."""

    def one(t: Tensor) -> Tensor:
        if t.is_meta and device.type != "meta":
            raise InputError(
                f"batch: a tensor of shape {tuple(t.shape)} is on the device 'meta' and holds no "
                f"numbers; the model is on {device}; give tensors with data"
            )
        # A copy to the host that does not wait is read before it has arrived.
        return t.to(device, non_blocking=device.type != "cpu")

    return map_tensors(one, batch)


def join(batches: list[Batch]) -> Batch:
    """Concatenate batches of one structure along the axis of examples."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, (Tensor, np.ndarray)):
        return torch.cat([torch.as_tensor(b) for b in batches])
    if isinstance(first, Mapping):
        return {key: join([b[key] for b in batches]) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(join(list(parts)) for parts in zip(*batches, strict=True)))
    if isinstance(first, (tuple, list)):
        return type(first)(join(list(parts)) for parts in zip(*batches, strict=True))
    return first


def digest(batch: Batch) -> str:
    """Return a hash of the numbers, shapes and dtypes of a batch."""
    state = hashlib.sha256()
    for tensor in tensors_of(batch):
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(digest_of_bytes(raw_bytes(tensor)))
    return state.hexdigest()


def digest_of_bytes(data: memoryview) -> bytes:
    """Return a hash over the hashes of pieces, which are made on all cores at once."""
    pieces = [data[start : start + HASH_PIECE] for start in range(0, len(data), HASH_PIECE)]
    if len(pieces) <= 1:
        return hashlib.sha256(data).digest()
    with ThreadPoolExecutor(min(len(pieces), os.cpu_count() or 1)) as pool:
        hashes = pool.map(lambda piece: hashlib.sha256(piece).digest(), pieces)
        return hashlib.sha256(b"".join(hashes)).digest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, whatever its dtype, device and layout."""
    if tensor.layout != torch.strided:
        return memoryview(b"".join(raw_bytes(part) for part in strided_parts(tensor)))
    flat = on_host(tensor.detach()).contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def on_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU; from CUDA by way of pinned memory."""
    if not tensor.is_cuda:
        return tensor.to("cpu")
    copied = tensor.to("cpu", non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copied


def strided_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that a tensor is made of: itself, or the parts of a sparse one."""
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense()]
