"""Runs one method of this package on a saved world; prints one line of JSON.

Usage: python own_run.py JOB, a process of its own, so that its peak memory is that of this run
alone. JOB is JSON with the keys of `Job`.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import worlds
from torch import nn

import dattri_core as dattri


@dataclass
class Job:
    """What to run.

    Args:
        world: Path of a saved world.
        method: A registered name, or the parts of a method.
        overrides: Fields that differ from the recipe's.
        parameters: Patterns of those to attribute; ``"layers"``: of linear layers and convolutions.
        memory: Budget.
        repeats: The shortest time of so many runs counts.
        split: Fit first, then attribute, each timed.
        dampings: A sweep instead of one attribution; implies ``split``.
        queries: Test examples, from the first; all when None.
        scores: Where to save the matrix.
        checkpoints: Folder of the checkpoints; the world's own weights when None.
        out: Where scores are written as they are computed, and queries may wait.
    """

    world: str
    method: str | Mapping[str, Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    parameters: str | list[str] = "*"
    memory: str | None = None
    repeats: int = 1
    split: bool = False
    dampings: list[float] | None = None
    queries: int | None = None
    scores: str | None = None
    checkpoints: str | None = None
    out: str | None = None


def resident_mib(which: str) -> float:
    """Return resident memory in MiB: ``"VmRSS"`` now, ``"VmHWM"`` at its highest (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{which} is not in /proc/self/status; peak memory is measured on Linux")


def reset_peak() -> None:
    """Begin a new high-water mark of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def method_of(method: str | Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Return the method, by name or from its parts."""
    if isinstance(method, str):
        return dattri.method(method, **overrides)
    return dattri.Method(**method, **overrides)


def task_of(
    world: worlds.World, parameters: str | list[str] = "*", checkpoints: str | None = None
) -> dattri.Task:
    """Return the task of a world."""
    chosen = worlds.layers_of(world.model) if parameters == "layers" else parameters
    return dattri.Task(world.model, world.loss, parameters=chosen, checkpoints=checkpoints)


def attribute(world: worlds.World, method: Any, memory: str | None = None) -> dattri.Scores:
    """Attribute once, as a user does."""
    with quiet():
        return method.attribute(task_of(world), world.train, world.test, memory=memory)


@contextmanager
def quiet() -> Iterator[None]:
    """Stopping before convergence is what these runs ask for: no word about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dattri.ConvergenceWarning)
        yield


def run(job: Job) -> dict[str, Any]:
    """Time the best of some runs, and the peak above what imports and a first small run took."""
    method = method_of(job.method, job.overrides)
    warm = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    with quiet(), suppress(dattri.DattriError):
        method.attribute(dattri.Task(nn.Linear(3, 2)), warm, warm)
    baseline = resident_mib("VmRSS")
    reset_peak()
    world = worlds.load(job.world)
    test = dattri.take(world.test, slice(0, job.queries))
    task = task_of(world, job.parameters, job.checkpoints)
    split = job.split or job.dampings is not None
    found: dict[str, Any] = {}
    best = float("inf")
    for turn in range(job.repeats):
        # A folder of its own: finished scores of the same call are returned, not computed.
        out = None if job.out is None else f"{job.out}-{turn}"
        with quiet():
            start = time.perf_counter()
            if split:
                fitted = method.fit(task, world.train, memory=job.memory)
                middle = time.perf_counter()
                if job.dampings is None:
                    scores = fitted.attribute(test, out=out)
                else:
                    swept = fitted.sweep(test, damping=job.dampings)
                    scores = next(iter(swept.values()))
                fit, score = middle - start, time.perf_counter() - middle
            else:
                scores = method.attribute(task, world.train, test, memory=job.memory)
                fit, score = 0.0, time.perf_counter() - start
        if fit + score < best:
            best = fit + score
            found = {"seconds": best, "fit": fit, "score": score}
    found["peak_mib"] = resident_mib("VmHWM") - baseline
    values = torch.as_tensor(np.asarray(scores.values))
    found["finite"] = bool(torch.isfinite(values).all())
    found["solver"] = scores.provenance["solver"]
    found["source"] = scores.provenance.get("source", [])
    plan = method.attribute(task, world.train, test, memory=job.memory, out=job.out, dry_run=True)
    notes = [note for note in plan.notes if not note.startswith("inner of ")]
    groups = f"{plan.groups} query group{'s' * (plan.groups > 1)} of {plan.query_group}"
    found["choice"] = "; ".join([f"{groups}, {plan.route}", *notes])
    if job.scores:
        np.save(job.scores, values.double().numpy())
    return found


if __name__ == "__main__":
    print(json.dumps(run(Job(**json.loads(sys.argv[1])))))
