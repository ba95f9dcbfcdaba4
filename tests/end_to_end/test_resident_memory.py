"""The memory that a process takes for a small network keeps to a small budget, heap and all."""

import subprocess
import sys

import pytest

SLACK = 10
"""MiB of the heap beside tensors: pages between those that are alive, and code read meanwhile."""
PROGRAM = """
import sys
import torch
from pathlib import Path
from torch import nn
import dattri_core as dattri

def resident(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024

def data(count, width):
    return torch.randn(count, width), torch.randint(2, (count,))

method, budget, queries = dattri.method(sys.argv[1]), float(sys.argv[2]) * 2**20, int(sys.argv[3])
torch.manual_seed(0)
torch.set_num_threads(1)
method.attribute(dattri.Task(nn.Linear(3, 2)), data(4, 3), data(4, 3))
layers = nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
task = dattri.Task(nn.Sequential(*layers))
train, test = data(1000, 784), data(queries, 784)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
method.attribute(task, train, test, memory=budget)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("method", "budget", "queries"),
    [
        ("logra", 50, 1000),  # many batches of queries beside one factor
        ("if-datainf", 64, 100),  # answers are combinations of rows, and none is formed
        pytest.param("logra", 100, 100, marks=pytest.mark.slow),
        pytest.param("if-ekfac", 100, 100, marks=pytest.mark.slow),
        pytest.param("grad-dot", 100, 100, marks=pytest.mark.slow),
    ],
)
def test_a_small_budget_is_kept_by_the_process(method, budget, queries):
    command = [sys.executable, "-c", PROGRAM, method, str(budget), str(queries)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(answer.stdout) < budget + SLACK
