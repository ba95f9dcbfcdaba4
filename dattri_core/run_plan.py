"""The plan of one run: what its request takes in memory, and where its queries may wait."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import torch

from dattri_core.checkpoint import Checkpoint
from dattri_core.memory import free_bytes
from dattri_core.plans import Place, Plan, Work, make_plan
from dattri_core.processes import processes_now
from dattri_core.protocols import Scorer
from dattri_core.requests import Request
from dattri_core.runner import run_folder
from dattri_core.shelf import free_on_disk
from dattri_core.snapshot import Fitted
from dattri_core.stream import Examples

SHARD_BATCHES = 16  # a run on disk loses at most so many batches when it is stopped

SHARDS_EACH = 4  # of several processes, so that each has about as much to do


def plan_run(
    fitted: Fitted,
    scorer: Scorer,
    request: Request,
    test: Examples,
    checkpoints: Sequence[Checkpoint],
    budget: int,
    device: torch.device,
    n_train: int,
    out: str | Path | None,
    k: int | None = None,
) -> Plan:
    """Return how a run is cut to fit the memory.

    Args:
        fitted: A checkpoint, whose costs are those of all.
        scorer: Of the method.
        request: What is asked.
        test: The test set.
        checkpoints: All of them.
        budget: Bytes that may be used.
        device: Of the rows.
        n_train: Examples that are scored.
        out: Folder of the scores, where they go to disk.
        k: Extremes that are kept of each query; None for all scores.
    """
    n_test = 1 if request.group else len(test)
    variants, readings = request.counts(fitted, tuple(checkpoints))
    # The tiles, and the matrices that they are put together into.
    result = 2 * readings * n_train * n_test * fitted.dtype.itemsize
    if k is not None:  # values and positions at both ends, with those of the next batch
        result = 4 * min(k, n_train) * n_test * (fitted.dtype.itemsize + 8)
    work = Work(
        n_train=n_train,
        n_test=n_test,
        checkpoints=len(checkpoints),
        result_bytes=0 if out is not None else result,
        variants=variants,
        readings=readings,
        summed=len(test) if request.group else 0,
        held=fitted.outline.kept,
        column=scorer.locality == "column",
    )
    measured = fitted.outline.measures(scorer)
    plan = make_plan(
        budget,
        fitted.outline.costs(variants=variants > 1, measured=measured),
        work,
        away=_away(device, out),
        notes=fitted.outline.notes,
    )
    if out is None:
        return plan
    shard = min(plan.shard, SHARD_BATCHES * plan.train_batch)
    if (processes := processes_now()) is not None:
        shard = min(shard, max(1, -(-n_train // (SHARDS_EACH * processes.size))))
    return attrs.evolve(plan, shard=shard)


def _away(device: torch.device, out: str | Path | None) -> dict[Place, int]:
    """Return the bytes free where queries may wait: beside a GPU, or on the disk of ``out``."""
    if device.type != "cpu":
        return {"host": free_bytes(torch.device("cpu"))}
    return {} if out is None else {"disk": free_on_disk(run_folder(Path(out)))}
