"""Worlds and peers of the benchmarks, and the table that a run leaves behind."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

HERE = Path(__file__).parent
ROWS: list[dict[str, Any]] = []


def _world(folder: Path, hidden: tuple[int, ...], n_train: int, n_test: int) -> Path:
    mnist = pytest.importorskip("dattri_benchmarks.mnist")
    try:
        parts = [mnist.read_mnist(part) for part in ("train", "t10k")]
    except Exception as error:
        pytest.skip(f"MNIST is not at hand (set DATTRI_DATA): {error}")
    path = folder / f"{'-'.join(map(str, hidden)) or 'lr'}_{n_train}x{n_test}.npz"
    torch.manual_seed(0)
    sizes = (784, *hidden, 10)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    arrays: dict[str, Any] = {}
    for name, (images, labels), count in zip(
        ("train", "test"), parts, (n_train, n_test), strict=True
    ):
        arrays[f"{name}_inputs"] = images[:count].reshape(count, -1).astype(np.float32) / 255
        arrays[f"{name}_labels"] = labels[:count].astype(np.int64)
    inputs, labels = (torch.from_numpy(arrays[f"train_{what}"]) for what in ("inputs", "labels"))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(20):
        for start in range(0, len(inputs), 100):
            part = slice(start, start + 100)
            loss = nn.functional.cross_entropy(model(inputs[part]), labels[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    for at, layer in enumerate(linear):
        arrays[f"weight{at}"] = layer.weight.detach().numpy()
        arrays[f"bias{at}"] = layer.bias.detach().numpy()
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function (hidden sizes, n_train, n_test) -> saved MNIST world."""
    folder = tmp_path_factory.mktemp("worlds")
    made: dict[Any, Path] = {}

    def get(hidden: tuple[int, ...], n_train: int, n_test: int) -> Path:
        key = (hidden, n_train, n_test)
        if key not in made:
            made[key] = _world(folder, *key)
        return made[key]

    return get


def measure_own(path: Path, method: str, repeats: int = 1, memory: str | None = None) -> Any:
    """Run a method of ours in a process of its own."""
    extra = [memory] if memory else []
    script = str(HERE / "own_run.py")
    return _json([sys.executable, script, str(path), method, str(repeats), *extra])


def measure_dattri(path: Path, method: str, batch: int, repeats: int = 1) -> Any:
    """Run dattri in its own environment, or return None where there is none."""
    python = os.environ.get("DATTRI_PEERS_PYTHON")
    if not python:
        return None
    script = str(HERE / "peer_dattri.py")
    return _json([python, script, str(path), method, str(batch), str(repeats)])


def _json(command: list[str]) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def row() -> Any:
    """Return a function that adds a line to the table."""

    def add(what: str, measured: str, against: str, ratio: float, goal: str, met: bool) -> None:
        ROWS.append(
            {
                "what": what,
                "measured": measured,
                "against": against,
                "ratio": f"{ratio:.2f}",
                "goal": goal,
                "met": "yes" if met else "no",
            }
        )

    return add


def pytest_sessionfinish() -> None:
    """Write the table where DATTRI_BENCH_TABLE says."""
    path = os.environ.get("DATTRI_BENCH_TABLE")
    if not ROWS or not path:
        return
    titles = ["what", "measured", "against", "ratio", "goal", "met"]
    command = (
        "Command: `make bench DATTRI_BENCH_TABLE=docs/results/speed.md`, with `DATTRI_DATA` at a "
        "folder that holds MNIST and `DATTRI_PEERS_PYTHON` at a Python that has dattri 0.3.0."
    )
    machine = (
        f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, Python {platform.python_version()}. Both sides of a ratio were "
        "measured in one run; times vary by tens of percent between runs."
    )
    lines = [
        "# Speed and memory",
        "",
        command,
        "",
        machine,
        "",
        "| " + " | ".join(titles) + " |",
        "|" + "---|" * len(titles),
        *("| " + " | ".join(str(line[title]) for title in titles) + " |" for line in ROWS),
        "",
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines))
