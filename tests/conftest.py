"""Makes the shared oracles importable, and the pretended device before autograd starts."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

# Processes that share the tests share the cores too; torch counts its threads when it is loaded.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

sys.path.insert(0, str(Path(__file__).parent))

# The first backward pass comes after this, in the first test.
importlib.import_module("dattri_core.laws.pretended").prepare()

try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError):  # of another build of torch
    # Transformers would load it because it is installed, and load nothing else then.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
