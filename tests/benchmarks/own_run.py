"""Runs one method of this package on saved weights and data; prints one line of JSON.

Usage: python own_run.py WORLD.npz METHOD [REPEATS] [MEMORY]. A process of its own, so that its peak
memory is that of this run alone.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dattri_core as dattri

SETTINGS: dict[str, dict[str, Any]] = {
    "if-cg": {"damping": 1e-2, "maximum_iterations": 10, "tolerance": 0.0},
    "if-explicit": {"damping": 1e-2},
}


def model_of(arrays: dict[str, np.ndarray]) -> nn.Sequential:
    """Return the network whose weights were saved."""
    layers: list[nn.Module] = []
    for at in range(sum(name.startswith("weight") for name in arrays)):
        weight, bias = arrays[f"weight{at}"], arrays[f"bias{at}"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data = torch.from_numpy(weight)
        layer.bias.data = torch.from_numpy(bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def resident_mib(which: str) -> float:
    """Return resident memory in MiB: ``"VmRSS"`` now, ``"VmHWM"`` at its highest (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{which} is not in /proc/self/status; peak memory is measured on Linux")


def reset_peak() -> None:
    """Begin a new high-water mark of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def load(path: str) -> tuple[nn.Sequential, Any, Any]:
    """Return the model and its two sets."""
    arrays = dict(np.load(path, allow_pickle=False))
    sets = [
        tuple(torch.from_numpy(arrays[f"{part}_{what}"]) for what in ("inputs", "labels"))
        for part in ("train", "test")
    ]
    return model_of(arrays), *sets


def run(world: Any, method: str, memory: str | None = None) -> dattri.Scores:
    """Attribute once; ``world`` is what `load` returned."""
    model, train, test = world
    made = dattri.method(method, **SETTINGS.get(method, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dattri.ConvergenceWarning)  # ten iterations are the task
        return made.attribute(dattri.Task(model), train, test, memory=memory)


def main(path: str, method: str, repeats: str = "1", memory: str | None = None) -> None:
    """Time the best of some runs, and the peak above what imports and a first small run took."""
    warm = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    dattri.attribute(dattri.Task(nn.Linear(3, 2)), warm, warm, method=method)
    baseline = resident_mib("VmRSS")
    reset_peak()
    world = load(path)
    times = []
    for _ in range(int(repeats)):
        start = time.perf_counter()
        run(world, method, memory)
        times.append(time.perf_counter() - start)
    peak = resident_mib("VmHWM") - baseline
    print(json.dumps({"seconds": min(times), "peak_mib": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
