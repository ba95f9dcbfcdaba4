"""Matrix products of float32 numbers that a CUDA device may round to TF32, while models train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch

from dattri_core import SpecError

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


def trained_in_tf32(setting: Any, what: str) -> Any:
    """Return a setting whose models are trained by matrix products in TF32 on a CUDA device.

    Args:
        setting: With a field ``tf32``, as the settings of sequences.
        what: Is asked of which setting, for the message.

    Raises:
        SpecError: It has no such field.
    """
    if not attrs.has(type(setting)) or "tf32" not in attrs.fields_dict(type(setting)):
        raise SpecError(
            f"{what}: it has no field tf32, as those of sequences do; leave it out, and its models "
            "are trained in the precision that torch is set to"
        )
    return attrs.evolve(setting, tf32=True)


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
