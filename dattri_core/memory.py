"""The memory budget: how it is read, what is free, and what running out looks like."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from dattri_core.errors import InputError, MemoryBudgetError, format_bytes

UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    UNITS[f"{_letter}ib"] = 1024**_power
    UNITS[f"{_letter}b"] = 1000**_power
    UNITS[_letter] = 1024**_power

DEFAULT_SHARE = 0.5
MINIMUM_BUDGET = 2**20


def parse_bytes(memory: str | int | float | None, device: torch.device) -> int:
    """Return a budget in bytes: a number, a text such as ``"16GiB"``, or half of what is free.

    Raises:
        InputError: The text is not a number with a unit, or the budget is under 1 MiB.
    """
    if memory is None:
        return int(free_bytes(device) * DEFAULT_SHARE)
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*([a-zA-Z]*)\s*", memory)
        if match is None or match[2].lower() not in UNITS:
            raise InputError(f"memory: {memory!r} is not a number with a unit such as '16GiB'")
        memory = float(match[1]) * UNITS[match[2].lower()]
    elif isinstance(memory, bool) or not isinstance(memory, (int, float)) or not isfinite(memory):
        raise InputError(f"memory: {memory!r} is not a number of bytes; give one, or '16GiB'")
    if memory < MINIMUM_BUDGET:
        raise InputError(
            f"memory: {format_bytes(memory)} is too little to work in; give 1 MiB or more"
        )
    return int(memory)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_meminfo(), _cgroup()]
    return min((limit for limit in limits if limit), default=4 * 2**30)


def _meminfo() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return 0


def _cgroup() -> int:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        return int(limit) - int(used) if limit != "max" else 0
    except (OSError, ValueError):
        return 0


def give_back() -> None:
    """Give freed memory back to the system, where the C library knows how.

    glibc keeps what lies below any tensor that is still there: after the fit of a convolutional
    network that was as much as all that was in use.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device or the host ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return not isinstance(error, MemoryBudgetError)
    # The allocator of the CPU on Linux and elsewhere, and libraries of CUDA.
    said = ("can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
