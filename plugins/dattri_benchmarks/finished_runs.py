"""Finished runs of classifiers, kept: what took long to train is read back the next time."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from pathlib import Path

import attrs
import torch
from attrs import frozen
from dattri_parts.training import ModelRetraining
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dattri_benchmarks.fetch import cache_folder
from dattri_core import Counterfactual, StoreError, atomic_file

StateDict = dict[str, Tensor]
LONG = 20.0
"""Seconds above which a run is kept: reading a shorter one back would gain little. On an
accelerator all are: trained again, a network ends at other last digits, and what was said of the
first is said of another."""


@frozen(eq=False)
class FinishedRun:
    """What is left of a run.

    Args:
        epochs: After which the states were taken; 0 for an optimum.
        states: One state dict for each of ``epochs``, the last one at the end.
        learning_rates: Of the steps just before each state.
        train_correct: ``[n_train]``, 1.0 where the last state gives most to the class of the label.
        test_correct: ``[n_test]``.
    """

    epochs: tuple[int, ...]
    states: tuple[StateDict, ...]
    learning_rates: tuple[float, ...]
    train_correct: Tensor
    test_correct: Tensor


def finished_run(retraining: ModelRetraining, counterfactual: Counterfactual) -> FinishedRun:
    """Return the run of a model: trained, or read from ``trained/`` in the folder of caches.

    A file there has the name of everything that the run depends on (`ModelRetraining.fingerprint`,
    the counterfactual, the kept epochs) and may be deleted at any time.

    Args:
        retraining: How to train.
        counterfactual: On what.

    Raises:
        StoreError: The file is truncated or foreign.
    """
    path = _path(retraining, counterfactual)
    if path.exists():
        return _read(path)
    started = time.perf_counter()
    run = retraining.run(counterfactual)
    states = tuple({k: v.cpu() for k, v in state.items()} for state in run.states)
    correct = (_correct(retraining, part, states[-1]) for part in ("train_data", "test_data"))
    finished = FinishedRun(run.epochs, states, run.learning_rates, *correct)
    if time.perf_counter() - started > LONG or retraining.device.type != "cpu":
        try:
            _write(path, finished)
        except OSError as error:
            warnings.warn(
                f"finished run: not kept in {str(path.parent)!r} ({error}); the next load of this "
                "world trains it again",
                RuntimeWarning,
                stacklevel=2,
            )
    return finished


def _correct(retraining: ModelRetraining, part: str, state: StateDict) -> Tensor:
    asked = attrs.evolve(
        retraining, test_data=getattr(retraining, part), targets=("correct",), together=1
    )
    return torch.from_numpy(asked.measure(state)["correct"])


def _path(retraining: ModelRetraining, counterfactual: Counterfactual) -> Path:
    keep = getattr(retraining.recipe, "keep", ())  # no part of the fingerprint
    words = json.dumps([retraining.fingerprint, counterfactual.key.hex(), keep])
    name = hashlib.sha256(words.encode()).hexdigest()
    return cache_folder() / "trained" / f"{name}.safetensors"


def _write(path: Path, run: FinishedRun) -> None:
    tensors = {
        f"{number}/{name}": tensor.contiguous()
        for number, state in enumerate(run.states)
        for name, tensor in state.items()
    }
    tensors |= {"correct/train": run.train_correct, "correct/test": run.test_correct}
    about = {"epochs": run.epochs, "learning_rates": run.learning_rates}
    with atomic_file(path) as handle:
        handle.write(save(tensors, {"run": json.dumps(about)}))


def _read(path: Path) -> FinishedRun:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["run"])
            states: list[StateDict] = [{} for _ in about["epochs"]]
            correct: dict[str, Tensor] = {}
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                kind, _, name = key.partition("/")
                (correct if kind == "correct" else states[int(kind)])[name] = file.get_tensor(key)
        epochs, rates = (tuple(about[name]) for name in ("epochs", "learning_rates"))
        return FinishedRun(epochs, tuple(states), rates, correct["train"], correct["test"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise StoreError(
            f"finished run {str(path)!r}: truncated or foreign ({error}); delete it to have the "
            "model trained again"
        ) from error
