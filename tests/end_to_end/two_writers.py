"""One of two processes that write to one folder: scores or a store. A script of its own.

Arguments: "scores" or "store", the folder, and where to save the values. Prints a line when it
begins to score or to write rows, and at the end how many tiles or shards it wrote.
"""

import sys
import time
from pathlib import Path

import attrs
import numpy as np
import torch
from oracles.toy_tasks import examples, mlp, states

import dattri_core as dattri
from dattri_core import Task, loop, stored
from dattri_core import run_plan as engine

TRAIN, TEST = examples(60), examples(3, seed=300)
SLOW = 0.05


def slowed(owner, name, seen):
    """Make a function take its time, and count its calls."""
    original = getattr(owner, name)

    def slow(*arguments, **named):
        if not seen:
            print("begun", flush=True)
        seen.append(name)
        time.sleep(SLOW)
        return original(*arguments, **named)

    setattr(owner, name, slow)


def main():
    kind, folder, saved = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    plan, layout = engine.make_plan, stored.plan_layout
    engine.make_plan = lambda *a, **k: attrs.evolve(plan(*a, **k), shard=6, train_batch=3)
    stored.plan_layout = lambda *a: attrs.evolve(layout(*a), shard=6, batch=3)
    task, seen = Task(mlp(), checkpoints=states(2)), []
    if kind == "scores":
        slowed(loop, "score_tile", seen)
        scores = dattri.attribute(task, TRAIN, TEST, method="grad-dot", out=folder)
    else:
        slowed(stored, "compute_shard", seen)
        scores = dattri.attribute(task, TRAIN, TEST, method="grad-dot", store=folder)
    np.save(saved, np.asarray(scores.values))
    print(len(seen))


if __name__ == "__main__":
    main()
