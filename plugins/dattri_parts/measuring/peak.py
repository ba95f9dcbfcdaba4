"""Peak memory of one step: of the process, from the kernel's own mark, or of a CUDA device."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from types import TracebackType

import torch

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
MEANING = (
    "highest resident memory of the process while the method ran, above its level before (the "
    "kernel's high-water mark, Linux only)"
)
MEANING_ON_CUDA = (
    "highest memory that tensors took on the device while the method ran, above its level before"
)


class PeakMemory:
    """Measures how far memory rose above its level at the start of a ``with`` block.

    On the processor it is resident memory: the kernel keeps the high-water mark itself, so no short
    peak between two samples is missed. ``bytes`` is None where there is no such mark. Memory that
    was freed but not given back before would hide in the level at the start, so it is given back
    first. On a CUDA device it is what torch allocated there.

    Args:
        device: Where the work is done; the processor by default.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.bytes: int | None = None
        self._device = device if device is not None and device.type == "cuda" else None
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device is not None:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            return self
        _give_back()
        try:
            RESET.write_text("5")
            self._start = _status("VmRSS")
        except OSError:
            self._start = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._start is None:
            return
        if self._device is not None:
            torch.cuda.synchronize(self._device)
            highest = torch.cuda.max_memory_allocated(self._device)
        else:
            highest = _status("VmHWM")
        self.bytes = max(0, highest - self._start)


def _status(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")


def _give_back() -> None:
    """Ask the C library to return free memory, where it can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return
