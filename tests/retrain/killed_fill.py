"""Fills stores in child processes that are killed, and compares what resumed runs give.

A script of its own, so that it forks before any thread exists. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from dattri_retrain import CounterfactualStore
from plans import same, subsets
from toys import Toy

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove"}


def fill(folder, count, **changes):
    CounterfactualStore(folder, Toy(**changes), every=0.0).fill(subsets(count))


def start(work):
    """Run work in a child; return its process id."""
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
    return child


def status_of(child):
    """Return the exit status of a child, negative for a signal."""
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


def is_whole(folder, count):
    """Return whether every row that is there is one of the plan's, with its outcomes."""
    store = CounterfactualStore(folder, Toy())
    there = {c.key for c in subsets(count)} - {c.key for c in store.missing(subsets(count))}
    kept = [c for c in subsets(count) if c.key in there]
    want = Toy().expected(kept, "loss") if kept else 0
    return len(store) == len(kept) and (not kept or (store.outcomes(kept, "loss") == want).all())


def resumed(folder, count, together, want):
    """Fill what is left, and return whether the rows are those of a run that nobody stopped."""
    store = CounterfactualStore(folder, Toy(together=together))
    store.fill(subsets(count))
    return same(store.rows(), want)


def at_every_change(root, together, want):
    """Kill when the disk is about to change for the k-th time, for every k; then resume."""
    moments, sound, equal = 0, True, True
    for count in range(1, 1000):
        folder = root / f"change-{together}-{count}"

        def work(folder=folder, count=count):
            die_at(count, folder)
            fill(folder, 6, together=together)

        status = status_of(start(work))
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        moments += 1
        sound &= is_whole(folder, 6)
        equal &= resumed(folder, 6, together, want)
    return {"moments": moments, "sound": bool(sound), "equal": equal}


def again_and_again(root, together, want):
    """Kill every run at its second model, until one comes through."""
    folder = root / f"again-{together}"
    for kills in range(20):
        if status_of(start(lambda: fill(folder, 6, together=together, die_after=together))) == 0:
            return {"kills": kills, "equal": resumed(folder, 6, together, want)}
    return {"kills": 20, "equal": False}


def by_the_clock(root, want):
    """Kill from outside at some time, whatever the process does then; twice in one store."""
    folder = root / "clock"
    path = CounterfactualStore(folder, Toy()).path
    kept, kills = [], 0
    for more in (3, 8):
        child = start(lambda: fill(folder, 30, pause=0.003))
        while len(list(path.glob("rows-*.npz"))) < more:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        kills += status_of(child) == -signal.SIGKILL
        kept.append(len(CounterfactualStore(folder, Toy())))
    return {"kills": kills, "kept": kept, "equal": resumed(folder, 30, 1, want)}


def at_once(root, want):
    """Let two processes fill one store."""
    folder = root / "at-once"
    children = [start(lambda: fill(folder, 30, together=2, pause=0.002)) for _ in range(2)]
    ended = [status_of(child) for child in children]
    toy = Toy()
    store = CounterfactualStore(folder, toy)
    store.fill(subsets(30))
    return {"status": ended, "again": toy.trained, "equal": same(store.rows(), want)}


def main():
    root = Path(sys.argv[1])
    want = {}
    for count in (6, 30):
        fill(root / "reference" / str(count), count)
        want[count] = CounterfactualStore(root / "reference" / str(count), Toy()).rows()
    print(
        json.dumps(
            {
                "changes": [at_every_change(root, together, want[6]) for together in (1, 4)],
                "again": [again_and_again(root, together, want[6]) for together in (1, 4)],
                "clock": by_the_clock(root, want[30]),
                "at once": at_once(root, want[30]),
            }
        )
    )


if __name__ == "__main__":
    main()
