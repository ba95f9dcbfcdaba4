"""Peak memory: memory that was taken and given back inside the block is seen."""

import sys

import numpy as np
import pytest
from dattri_parts.measuring import peak as module
from dattri_parts.measuring.peak import PeakMemory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_short_peak_is_seen_and_an_earlier_one_is_not():
    np.ones(60_000_000 // 8)  # before
    with PeakMemory() as quiet:
        pass
    with PeakMemory() as loud:
        big = np.ones(120_000_000 // 8)
        del big
    assert loud.bytes is not None
    assert quiet.bytes < 20_000_000
    assert 110_000_000 < loud.bytes < 160_000_000


def test_where_it_cannot_be_measured_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "RESET", tmp_path / "no" / "such")
    with PeakMemory() as found:
        pass
    assert found.bytes is None
