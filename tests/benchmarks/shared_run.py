"""Runs one method on a saved world in one of several processes; prints one line of JSON.

Usage: python shared_run.py JOB. JOB is JSON: ``world``, ``method``, ``overrides``, ``queries``,
``rank``, ``size``, ``meeting`` (a file that does not exist yet) and ``scores`` (a file for the
matrix, written by the first process). One thread a process, as on machines of as many cores.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import own_run
import torch
import worlds
from torch import distributed

import dattri_core as dattri


def main(job: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of the fit and of scoring."""
    torch.set_num_threads(1)
    rank, size = job["rank"], job["size"]
    if size > 1:
        where = f"file://{job['meeting']}"
        distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    world = worlds.load(job["world"])
    test = dattri.take(world.test, slice(0, job["queries"]))
    method = own_run.method_of(job["method"], job["overrides"])
    with own_run.quiet(), dattri.distributed() if size > 1 else nullcontext():
        start = time.perf_counter()
        fitted = method.fit(own_run.task_of(world), world.train)
        middle = time.perf_counter()
        scores = fitted.attribute(test)
        end = time.perf_counter()
    if rank == 0:
        np.save(job["scores"], torch.as_tensor(scores.values).double().numpy())
    if size > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    return {"fit": middle - start, "score": end - middle}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
