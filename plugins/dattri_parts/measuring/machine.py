"""Where numbers were measured: versions of software, and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dattri_core import __version__

LIBRARIES = ("torch", "numpy", "scipy")
CPU = Path("/proc/cpuinfo")


def versions() -> dict[str, str]:
    """Return the versions that numbers depend on, by name."""
    return {
        "dattri-core": __version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def hardware() -> dict[str, str | int]:
    """Return the machine: system, processor, cores this process may use, threads, accelerator.

    With an accelerator also ``TF32``: which products of float32 numbers it may take with 10 bits
    after the point in place of 23, as torch has them for convolutions unless told otherwise.
    """
    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
        found["TF32"] = ", ".join(_rounded()) or "off"
    return found


def _rounded() -> list[str]:
    """Return the products of float32 that CUDA may take in TF32."""
    backends: Any = torch.backends
    cudnn, matmul = backends.cudnn, backends.cuda.matmul
    found = []
    if _allowed(cudnn, lambda: cudnn.conv):
        found.append("convolutions")
    if _allowed(matmul, lambda: matmul):
        found.append("matrix products")
    return found


def _allowed(older: Any, newer: Callable[[], Any]) -> bool:
    try:
        return bool(older.allow_tf32)
    except RuntimeError:  # set by the newer name, beside which the older one cannot be read
        return bool(newer().fp32_precision == "tf32")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = CPU.read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
