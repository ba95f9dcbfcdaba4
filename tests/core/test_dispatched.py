"""Modes that see what torch computes: no compiler is loaded for them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dattri_core import DispatchMode, run_under

RUN = """
import sys, torch, dattri_core as dattri
layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
task = dattri.Task(torch.nn.Sequential(*layers))
data = torch.randn(9, 3), torch.arange(9) % 2
dattri.attribute(task, data, data, method=sys.argv[1], progress=False)
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("method", ["grad-dot", "if-ekfac", "trak"])
def test_a_first_run_loads_no_compiler(method: str) -> None:
    """It takes more than a second; products of curvatures need it, by ``torch.func``."""
    command = [sys.executable, "-W", "ignore", "-c", RUN, method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]


class Names(DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_what_is_computed_forward_and_backward() -> None:
    weight = torch.ones(2, 3, requires_grad=True)

    def run() -> None:
        (torch.ones(4, 3) @ weight.T).sum().backward()

    names = Names()
    assert run_under(names, run)
    assert names.seen.count("mm") == 2
    assert "sum" in names.seen
