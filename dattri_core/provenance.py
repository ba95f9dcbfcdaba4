"""What decides scores, and what decides a fit: JSON-ready facts kept beside the numbers."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch

from dattri_core import __version__, assemble
from dattri_core.checkpoint import Checkpoint
from dattri_core.origins import origins_of
from dattri_core.requests import Request
from dattri_core.snapshot import Fitted, task_of
from dattri_core.store import Store
from dattri_core.stream import Examples
from dattri_core.task import Task


def provenance_of(
    method: Any,
    task: Task,
    checkpoints: Sequence[Checkpoint],
    fitted: Fitted,
    train: Examples,
    test: Examples,
    reference: Examples | None,
    request: Request,
    store: Store | None,
    fitted_on: Examples,
) -> dict[str, Any]:
    """Return what scores are made of: method, task, weights, data and versions.

    Args:
        method: A `Method`.
        task: Its task.
        checkpoints: Those of the task, each network that a source makes of one by itself.
        fitted: The first of them.
        train: The examples that are scored.
        test: The test set.
        reference: The reference examples of the task.
        request: What was asked.
        store: Where train rows are read.
        fitted_on: The train set of the fit, which may be another one.
    """
    asked = task_of(fitted.chain.source, task)
    target = asked.target
    weights = {c.origin: _weights(c, fitted, task) for c in task.checkpoints}
    return {
        "method": method.to_spec(),
        "n_train": len(train),
        "n_test": len(test),
        "loss": task.loss_name,
        "target": {
            "name": asked.target_name,
            "higher_is_better": bool(target is not None and target.higher_is_better),
        },
        "checkpoints": [c.name for c in checkpoints],
        "learning_rates": [c.learning_rate for c in checkpoints],
        "parameters": list(task.parameter_names),
        "weights": [weights[c.origin] for c in checkpoints],
        "space": fitted.chain.source.space.fingerprint,
        "train": train.fingerprint,
        "test": test.fingerprint,
        "fitted_on": None if fitted_on is train else _fitted_on(fitted_on),
        "reference": None if reference is None else reference.content,
        "group": "sum" if request.group else None,
        "store": None if store is None else {"dtype": store.dtype},
        "versions": {**_versions(), **origins_of((method, task.loss, task.target))},
    }


def _weights(checkpoint: Checkpoint, fitted: Fitted, task: Task) -> str:
    """Return a hash of the weights; those of a live model were hashed just before."""
    same = checkpoint.origin == fitted.checkpoint.origin
    known = fitted.weights if same and checkpoint.source is None else None
    return known or checkpoint.fingerprint(task.model)


def _fitted_on(train: Examples) -> dict[str, Any]:
    return {"n_train": len(train), "train": train.fingerprint}


def facts_of_rows(method: Any, task: Task, train: Examples) -> dict[str, Any]:
    """Return what decides the rows that a method begins with, besides the checkpoint."""
    return {
        **assemble.describe_front(method),
        "seed": method.seed,
        "loss": task.loss_name,
        "parameters": list(task.parameter_names),
        "train": train.fingerprint,
        "dattri-core": __version__,
    }


def facts_of_fits(
    method: Any, task: Task, train: Examples, reference: Examples | None, store: Store | None
) -> dict[str, Any]:
    """Return what decides a fit besides the checkpoint, the stages before it, and the part."""
    return {
        "source": assemble.describe_part(method.source),
        "loss": task.loss_name,
        "target": None if reference is None else task.target_name,
        "parameters": list(task.parameter_names),
        "train": train.content,
        "reference": None if reference is None else reference.content,
        "store": None if store is None else store.dtype,
        "versions": _versions(),
        "origins": origins_of((method.source, task.loss)),
    }


def _versions() -> dict[str, str]:
    return {
        "dattri-core": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
