"""Builds a gradient store in child processes that are killed, and compares what resumed ones give.

A script of its own, so that it forks before any thread exists. Prints one JSON object.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import attrs
import numpy as np
import torch
from killed_run import die_at, forked
from oracles.toy_tasks import examples, mlp, states

import dattri_core as dattri
from dattri_core import Task, stored

TRAIN = examples(26, dtype=torch.float32)
TEST = examples(5, seed=300, dtype=torch.float32)


def cut_small():
    """Cut the rows of a checkpoint into 5 shards of two batches each."""
    original = stored.plan_layout

    def plan(*arguments):
        return attrs.evolve(original(*arguments), batch=3, shard=6)

    stored.plan_layout = plan


def run(folder):
    """Attribute through a store and keep the scores beside it."""
    task = Task(mlp(dtype=torch.float32), checkpoints=states(2, dtype=torch.float32))
    method = dattri.method("logra", rank=3, damping=1e-2)
    scores = method.attribute(task, TRAIN, TEST, store=folder / "rows", memory="64MiB")
    np.save(folder / "scores.npy", scores.values.numpy())


def files(folder):
    """Return the bytes of every file of the store, by name."""
    root = folder / "rows"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def differs(folder, reference):
    same = files(folder) == files(reference)
    return (
        not same or (folder / "scores.npy").read_bytes() != (reference / "scores.npy").read_bytes()
    )


def at_changes(root, reference):
    """Kill at every moment at which the disk changes, then resume once."""
    moments = different = 0
    for count in range(1, 10_000):
        folder = root / f"change-{count}"
        folder.mkdir()

        def work(folder=folder, count=count):
            die_at(count, folder / "rows")
            run(folder)

        if forked(work) == 0:
            break
        moments += 1
        assert forked(lambda folder=folder: run(folder)) == 0
        different += differs(folder, reference)
    return {"moments": moments, "different": different}


def counted(folder, last=None):
    """Run, and kill this process at its last-th call of a Python function; return how many."""
    calls = [0]

    def hook(frame, event, argument):
        calls[0] += event == "call"
        if calls[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(hook)
    run(folder)
    sys.setprofile(None)
    return calls[0]


def at_random(root, reference):
    """Kill at 20 random moments of a run, wherever it is then: numbers, files or neither."""
    counting = root / "counting"
    counting.mkdir()
    assert forked(lambda: (root / "calls").write_text(str(counted(counting)))) == 0
    calls = int((root / "calls").read_text())
    kills = different = partial = 0
    rng = random.Random(0)
    for step in range(20):
        folder = root / f"random-{step}"
        folder.mkdir()
        last = rng.randrange(calls // 20, calls)
        kills += forked(lambda folder=folder, last=last: counted(folder, last)) == -signal.SIGKILL
        there = len(files(folder)) if (folder / "rows").exists() else 0
        partial += 0 < there < len(files(reference))
        assert forked(lambda folder=folder: run(folder)) == 0
        different += differs(folder, reference)
    return {"kills": kills, "partial": partial, "different": different}


def main():
    root = Path(sys.argv[1])
    cut_small()
    reference = root / "reference"
    reference.mkdir()
    dattri.method("logra")  # imports the parts once, not in every child
    assert forked(lambda: run(reference)) == 0
    print(
        json.dumps(
            {
                "files": len(files(reference)),
                "changes": at_changes(root, reference),
                "random": at_random(root, reference),
            }
        )
    )


if __name__ == "__main__":
    main()
