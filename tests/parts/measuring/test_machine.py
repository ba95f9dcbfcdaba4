"""Where numbers were measured."""

import platform
from types import SimpleNamespace

import pytest
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


class Unreadable:
    """Flags that were set by the newer names: the older one cannot be read beside them."""

    def __init__(self, precision):
        self.fp32_precision = precision
        self.conv = self

    @property
    def allow_tf32(self):
        raise RuntimeError("you have used a mix of the legacy and new APIs")


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize(
    ("convolutions", "products", "want"),
    [
        (True, False, "convolutions"),
        (False, True, "matrix products"),
        (True, True, "convolutions, matrix products"),
        (False, False, "off"),
    ],
)
def test_an_accelerator_is_named_with_what_it_rounds(
    monkeypatch, convolutions, products, want, newer
):
    flags = [
        Unreadable("tf32" if on else "ieee") if newer else SimpleNamespace(allow_tf32=on)
        for on in (convolutions, products)
    ]
    backends = SimpleNamespace(cudnn=flags[0], cuda=SimpleNamespace(matmul=flags[1]))
    monkeypatch.setattr(torch, "backends", backends)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    found = hardware()
    assert (found["accelerator"], found["TF32"]) == ("NVIDIA H200", want)


def test_the_flags_of_this_torch_are_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert hardware()["TF32"] == "convolutions"  # as torch has them at first
