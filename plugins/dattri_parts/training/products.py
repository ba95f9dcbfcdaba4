"""Matrix products of float32 numbers that a CUDA device may round to TF32, while models train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ROUNDING = ("cuda",)
"""Devices that have products in TF32."""


@contextmanager
def rounded_products(allowed: bool, device: torch.device) -> Iterator[None]:
    """Where allowed, let a device take matrix products of float32 in TF32, then restore.

    What is not allowed here stays as torch has it. The flag is torch's, of the whole process: what
    other threads multiply on CUDA devices meanwhile may be rounded too.
    """
    matmul: Any = torch.backends.cuda.matmul
    if not allowed or device.type not in ROUNDING or _rounds(matmul):
        yield
        return
    precision = getattr(matmul, "fp32_precision", None)  # from torch 2.9
    older = _reads_older(matmul)
    try:
        if older:  # sets the newer name as well, so that both can be read while models train
            matmul.allow_tf32 = True
        else:
            matmul.fp32_precision = "tf32"
        yield
    finally:
        if older:
            matmul.allow_tf32 = False
        if precision is not None:
            matmul.fp32_precision = precision


def _rounds(matmul: Any) -> bool:
    if _reads_older(matmul):
        return bool(matmul.allow_tf32)
    return bool(matmul.fp32_precision == "tf32")


def _reads_older(matmul: Any) -> bool:
    try:
        matmul.allow_tf32  # noqa: B018 - reading it is what may fail
    except RuntimeError:  # set by the newer name, beside which the older one cannot be read
        return False
    return True
