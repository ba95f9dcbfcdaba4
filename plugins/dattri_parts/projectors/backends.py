"""Which implementation of a random matrix works: all of them give the same one."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from dattri_core import SpecError

Backend = Literal["auto", "numpy", "torch", "triton"]
BACKENDS = ("auto", "numpy", "torch", "triton")
LEAST_CAPABILITY = (8, 0)
"""Of a CUDA device, for tensor cores that multiply bfloat16."""


def chosen_backend(
    backend: Backend, device: torch.device, projector: str
) -> Literal["numpy", "torch", "triton"]:
    """Return the implementation to use: ``"auto"`` is Triton on CUDA where it runs, else torch.

    Args:
        backend: What was asked for.
        device: Of the rows.
        projector: Registered name, for messages.

    Raises:
        SpecError: Triton was asked for, and cannot run there.
    """
    if backend == "auto":
        return "torch" if _lacking(device) else "triton"
    if backend == "triton" and (lacking := _lacking(device)):
        raise SpecError(
            f"projector {projector!r}: backend='triton' cannot run here: {lacking}; use "
            "backend='auto' or 'torch', which give the same matrix"
        )
    return backend


def _lacking(device: torch.device) -> str:
    """Return what Triton lacks on a device, empty if nothing."""
    if device.type != "cuda":
        return f"the rows are on the device {str(device)!r}, not on CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if importlib.util.find_spec("triton.tools.tensor_descriptor") is None:
        return "triton is older than 3.4, which comes with torch 2.8"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"compute capability {capability} is below {LEAST_CAPABILITY}"
    return ""
