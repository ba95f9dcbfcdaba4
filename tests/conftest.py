"""Makes the shared oracles importable, and the pretended device before autograd starts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from dattri_core.laws.pretended import prepare

prepare()  # before the first backward pass, which is before the first test

try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError):  # of another build of torch
    # Transformers would load it because it is installed, and load nothing else then.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
