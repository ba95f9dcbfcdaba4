"""Ensembles: several trained models of a world, kept as files and shared by methods and runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dattri_parts.training import random_subsets
from safetensors.torch import save

from dattri_bench.request import TrainedOn
from dattri_core import Counterfactual, Task, atomic_file, bar

NAMESPACE = 730_100_000
"""Added to the seed, so that masks are drawn apart from those that metrics retrain on."""
FRACTION: dict[TrainedOn, float] = {"full": 1.0, "half": 0.5}


def members(n: int, count: int, trained_on: TrainedOn, seed: int) -> list[Counterfactual]:
    """Return what each model of an ensemble is trained on; member k depends on seed and k alone.

    Args:
        n: Train examples.
        count: Models.
        trained_on: ``"full"``, all examples, or ``"half"``, ``n / 2`` drawn without replacement.
        seed: Of the world.
    """
    return random_subsets(n, count, fraction=FRACTION[trained_on], seed=NAMESPACE + seed)


def train_members(
    world: Any, counterfactuals: Sequence[Counterfactual], folder: Path
) -> list[Path]:
    """Return a safetensors file for each model; those that are missing are trained.

    Each file is written as soon as its model is trained, so that a run that was stopped goes on.

    Args:
        world: Whose ``retraining`` trains them.
        counterfactuals: Their train sets and seeds.
        folder: Holds a folder for each training recipe, by its fingerprint.
    """
    retraining = world.retraining
    own = folder / "models" / hashlib.sha256(retraining.fingerprint.encode()).hexdigest()[:24]
    paths = [own / f"{hashlib.sha256(c.key).hexdigest()[:24]}.safetensors" for c in counterfactuals]
    missing = [(c, p) for c, p in zip(counterfactuals, paths, strict=True) if not p.exists()]
    together = max(1, retraining.together)
    with bar("ensemble", len(missing), None) as shown:
        for start in range(0, len(missing), together):
            chunk = missing[start : start + together]
            states = retraining.train([counterfactual for counterfactual, _ in chunk])
            for (_, path), state in zip(chunk, states, strict=True):
                # a copy of each: tied weights share memory, which the format does not hold
                whole = {name: t.detach().cpu().clone() for name, t in state.items()}
                with atomic_file(path) as handle:
                    handle.write(save({name: t.contiguous() for name, t in whole.items()}))
                shown.advance()
    return paths


def ensemble_task(world: Any, paths: Sequence[Path]) -> Task:
    """Return the world's task at other trained models."""
    task = world.task
    return Task(
        task.model,
        task.loss,
        target=task.named_target,
        checkpoints=list(paths),
        parameters=list(task.parameter_names),
        reference=task.reference,
    )
