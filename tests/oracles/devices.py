"""The devices that tests run on: the CPU, one that pretends, and CUDA where there is one."""

from __future__ import annotations

import pytest

from dattri_core.laws.pretended import NAME, prepare

REASON = prepare()
PRETENDED = pytest.param(NAME, marks=pytest.mark.skipif(bool(REASON), reason=REASON))
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
ACCELERATORS = [PRETENDED, CUDA]
DEVICES = ["cpu", *ACCELERATORS]
