"""Runs a method with out= in child processes that are killed, and compares what resumed runs give.

A script of its own, so that it forks before any thread exists. Prints one JSON object.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import attrs
import numpy as np
import torch
from oracles.toy_tasks import examples, mlp, states

import dattri_core as dattri
from dattri_core import Scores, Task
from dattri_core import run_plan as engine

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
TRAIN = examples(14, dtype=torch.float32)
TEST = examples(5, seed=300, dtype=torch.float32)


def cut_small():
    original = engine.make_plan

    def plan(*arguments, **named):
        made = original(*arguments, **named)
        return attrs.evolve(made, train_batch=3, test_batch=2, query_group=3, groups=2, shard=6)

    engine.make_plan = plan


def run(out, method):
    weights = states(2, dtype=torch.float32)
    task = Task(mlp(dtype=torch.float32), checkpoints=weights, learning_rates=[0.5, 0.25])
    return dattri.attribute(task, TRAIN, TEST, method=method, out=out, memory="64MiB")


def forked(work):
    """Run work in a child; return its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(count, folder):
    """Kill this process when it is about to change the disk below folder for the count-th time."""
    seen = [0]

    def hook(event, arguments):
        if event in CHANGES and any(
            isinstance(a, (str, os.PathLike)) and str(a).startswith(str(folder)) for a in arguments
        ):
            seen[0] += 1
            if seen[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_at(count, folder, method):
    def work():
        die_at(count, folder)
        run(folder / "scores", method)

    return forked(work)


def sound(folder):
    """Return whether the scores are whole or absent."""
    if not (folder / "scores").exists():
        return True
    Scores.load(folder / "scores")
    return True


def values(folder):
    return np.load(folder / "scores" / "values.npy")


def sweep(root, method, reference, stride):
    """Kill at every stride-th moment at which the disk changes, then resume once."""
    moments = different = left = 0
    for count in range(1, 10_000, stride):
        folder = root / f"{method}-{count}"
        folder.mkdir()
        status = killed_at(count, folder, method)
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        moments += 1
        assert sound(folder)
        assert forked(lambda folder=folder: run(folder / "scores", method)) == 0
        different += values(folder).tobytes() != reference.tobytes()
        left += len(list(folder.iterdir())) - 1
    return {"moments": moments, "different": different, "left": left}


def again_and_again(root, method, reference):
    """Kill every run after a few moments, a few more each time, until one comes through."""
    folder = root / f"{method}-again"
    folder.mkdir()
    for kills in range(20):
        if killed_at(25 + 3 * kills, folder, method) == 0:
            return {"kills": kills, "different": values(folder).tobytes() != reference.tobytes()}
    return {"kills": 20, "different": True}


def by_the_clock(root, method, reference):
    """Kill from outside at some time, whatever the process does then."""
    kills = different = 0
    for step in range(3):
        folder = root / f"{method}-clock-{step}"
        folder.mkdir()
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            run(folder / "scores", method)
            os._exit(0)
        time.sleep(0.02 + 0.04 * step)
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert forked(lambda folder=folder: run(folder / "scores", method)) == 0
        different += values(folder).tobytes() != reference.tobytes()
    return {"kills": kills, "different": different}


def main():
    root, method, stride = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    cut_small()
    dattri.method(method)  # imports the parts once, not in every child

    def in_memory():
        np.save(root / "memory.npy", run(None, method).values.numpy())

    assert forked(in_memory) == 0
    reference = np.load(root / "memory.npy")
    print(
        json.dumps(
            {
                "sweep": sweep(root, method, reference, stride),
                "again": again_and_again(root, method, reference),
                "clock": by_the_clock(root, method, reference),
                "nonzero": bool((reference != 0).all()),
            }
        )
    )


if __name__ == "__main__":
    main()
