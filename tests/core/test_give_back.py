"""Memory that was freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from pathlib import Path
import torch
from dattri_core.memory import give_back

def resident():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) / 1024

if not hasattr(ctypes.CDLL(None), "malloc_trim"):
    raise SystemExit(3)
large = torch.ones(2**22)
del large  # which sets how large a piece glibc keeps
before = resident()
pieces = [torch.ones(2**18) for _ in range(200)]
last = torch.ones(2**18)  # above them in the heap
pieces.clear()
kept = resident() - before
give_back()
print(kept, resident() - before, float(last.sum()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_what_lies_below_a_tensor_in_use_goes_back() -> None:
    """200 MiB that were freed are no longer counted as those of the process; the rest is there."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("the C library has no malloc_trim")
    kept, left, total = map(float, done.stdout.split())
    assert kept > 150
    assert left < 20
    assert total == 2**18
