"""The tools for plugin authors: peak memory, blocked discovery, laws as pytest cases."""

import unittest

import pytest
import torch

from dattri_core import SpecError
from dattri_core.registry import default_registry
from dattri_core.testing import PeakMemory, law_cases, no_plugins


def test_peak_memory_counts_what_is_alive():
    before = torch.zeros(1000)
    with PeakMemory() as memory:
        a = torch.zeros(256)  # 1 KiB
        assert (memory.live, memory.peak) == (1024, 1024)
        b = a + 1
        view = b[:10].reshape(2, 5)
        assert (memory.live, memory.peak) == (2048, 2048)
        del b
        assert memory.live == 2048  # the view holds the storage
        del view
        assert memory.live == 1024
        before.add_(1)  # made before: not counted, nor are views of it
        kept = before[:500]
        assert memory.live == 1024
        c = (a * 2) * 3  # the intermediate dies
        assert (memory.live, memory.peak) == (2048, 3072)
        del c
        memory.reset()
        assert memory.peak == 1024
        a.add_(1)
        assert memory.peak == 1024
    del a
    assert memory.live == 0
    assert kept is not None


def test_peak_memory_sees_what_autograd_keeps():
    weight = torch.zeros(64, 64, requires_grad=True)
    with PeakMemory() as memory:
        loss = (torch.ones(16, 64) @ weight).exp().square().sum()
        kept = memory.live
        assert kept >= 2 * 16 * 64 * 4  # the inputs of matmul and of square
        loss.backward()
        assert memory.live < kept + 64 * 64 * 4
    assert memory.peak >= kept


def test_peak_memory_is_the_same_every_time():
    def work():
        with PeakMemory() as memory:
            x = torch.ones(50, 50)
            for _ in range(5):
                x = torch.softmax(x @ x, 1)
        return memory.peak

    assert len({work() for _ in range(3)}) == 1


def test_discovery_can_be_blocked():
    assert "dot" in default_registry().names("scorer")
    with no_plugins() as registry:
        assert default_registry() is registry
        assert registry.names("scorer") == []
        with pytest.raises(SpecError):
            registry.make("scorer", "dot")
    assert "dot" in default_registry().names("scorer")


@pytest.mark.parametrize("law", law_cases("scorer", "dot"))
def test_laws_as_cases(law):
    law()


def test_cases_are_named_and_skip():
    cases = {case.__name__: case for case in law_cases("method", "random")}
    with pytest.raises(unittest.SkipTest, match="it has no damping"):
        cases["damping-can-change"]()
    with pytest.raises(unittest.SkipTest, match="expected: scores depend on positions"):
        cases["an-example-helps-itself"]()
