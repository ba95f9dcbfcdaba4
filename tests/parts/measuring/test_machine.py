"""Where numbers were measured."""

import platform

import torch
from dattri_parts.measuring.machine import hardware, versions
from dattri_parts.measuring.threads import threads

import dattri_core


def test_versions_are_those_that_run():
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["dattri-core"] == dattri_core.__version__
    assert found["Python"] == platform.python_version()


def test_the_machine_is_described_with_the_threads_in_use():
    before = torch.get_num_threads()
    with threads(1):
        found = hardware()
        assert found["threads"] == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with threads(None):
        assert torch.get_num_threads() == before
    assert found["cores"] >= 1
    assert found["processor"]
