"""The Triton kernels give the matrix of torch, as far as their interpreter can show it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_fused_sums_of_integers_are_exact_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
