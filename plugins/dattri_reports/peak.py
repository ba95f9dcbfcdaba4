"""Peak memory of one step of a process, from the kernel's own high-water mark."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
MEANING = (
    "highest resident memory of the process while the method ran, above its level before (the "
    "kernel's high-water mark, Linux only)"
)


class PeakMemory:
    """Measures how far resident memory rose above its level at the start of a ``with`` block.

    The kernel keeps the high-water mark itself, so no short peak between two samples is missed.
    ``bytes`` is None where there is no such mark. Memory that was freed but not given back before
    would hide in the level at the start, so it is given back first.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
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
        if self._start is not None:
            self.bytes = max(0, _status("VmHWM") - self._start)


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
