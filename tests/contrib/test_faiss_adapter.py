"""The adapter to FAISS as a third party ships it: its own tests, with dattri-core as it is here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "contrib" / "dattri-faiss"


def test_its_tests_pass() -> None:
    path = os.pathsep.join([str(FOLDER), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "tests"],
        capture_output=True,
        text=True,
        check=False,
        cwd=FOLDER,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if importlib.util.find_spec("faiss") is None:
        assert "1 passed" in done.stdout  # the message that says what to install
        pytest.skip("FAISS is not installed, so its index is not tested: pip install faiss-cpu")
    assert "skipped" not in done.stdout
