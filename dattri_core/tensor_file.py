"""Writing a safetensors file from tensors as they lie in memory, without a copy of the whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dattri_core.batch import raw_bytes

NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the order in which a file holds them, so that numbers lie at multiples of their size."""
ALIGNED = 8
"""Bytes of which the header is a multiple."""


def tensor_file(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file in order: those of `safetensors.torch.save`.

    Args:
        tensors: On the CPU.
        metadata: Goes to the header.
    """
    place = {dtype: at for at, dtype in enumerate(NAMES)}
    ordered = sorted(tensors, key=lambda name: (place[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in ordered:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in ordered:
        yield raw_bytes(tensors[name])
