"""The folder of a recorded run: a file for each step, of its weights and its facts.

Of a run of Adam a second file beside it holds the moments before the step.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import asdict, field, frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dattri_core import (
    AdamRule,
    AdamState,
    Checkpoint,
    InputError,
    StoreError,
    TrainingStep,
    atomic_file,
)
from dattri_unroll.moments_file import moments_file, require_moments

FACTS, DIGEST = "dattri_step", "dattri_sha256"
"""Keys in the header of a file: what was recorded of the step, a hash of that and the weights."""
NAME = re.compile(r"step-(\d{8})\.safetensors")


def _rule(found: AdamRule | Mapping[str, Any] | None) -> AdamRule | None:
    if found is None or isinstance(found, AdamRule):
        return found
    beta1, beta2 = found["betas"]
    return AdamRule((beta1, beta2), found["epsilon"], found["decoupled"])


@frozen
class StepFacts:
    """What is recorded of a step beside the weights that it was taken from.

    Args:
        run: Drawn when the recording began, so that files of two runs are not mixed.
        position: Of the step in the run, from 0.
        learning_rate: Of the optimiser at the step.
        weight_decay: Likewise; by name of parameter where groups have different ones.
        epoch: Which pass over the train set.
        batch: Positions of its examples; None: all of them. Empty at the end of the run.
        momentum: Of the optimiser, the same at all steps.
        dampening: Likewise.
        nesterov: Likewise.
        adam: How Adam steps, the same at all steps; None: the optimiser is SGD.
        clip: Largest norm of the gradient, where it was clipped.
        scale: What was minimised over the mean loss of the batch.
        moments: SHA-256 of the file of Adam's moments before the step; empty: it has none yet.
        rates: Learning rates of parameters over that of the optimiser, where they are others.
    """

    run: str
    position: int
    learning_rate: float
    weight_decay: float | dict[str, float]
    epoch: int
    batch: list[int] | None
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    adam: AdamRule | None = field(default=None, converter=_rule)
    clip: float | None = None
    scale: float = 1.0
    moments: str = ""
    rates: dict[str, float] = field(factory=dict)

    @property
    def ends(self) -> bool:
        """Return whether the file holds the weights after the last step."""
        return self.batch == []


def step_file(folder: Path, position: int) -> Path:
    """Return the file of a step."""
    return folder / f"step-{position:08d}.safetensors"


def write_step(folder: Path, facts: StepFacts, state: Mapping[str, Tensor]) -> None:
    """Write the file of a step; it appears whole or not at all."""
    text = json.dumps(asdict(facts))
    header = {FACTS: text, DIGEST: _digest(text, state)}
    with atomic_file(step_file(folder, facts.position)) as handle:
        handle.write(save(dict(state), metadata=header))


def read_facts(path: Path) -> StepFacts:
    """Read the facts of a step; of the file only the header is read.

    Raises:
        StoreError: The file is no whole file of a recorded step.
    """
    return _facts_of(path, _header(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights of a step, and compare them and its facts with their hash.

    Raises:
        StoreError: The file is truncated, foreign or damaged.
    """
    header = _header(path)
    _facts_of(path, header)
    try:
        state = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    if _digest(header[FACTS], state) != header.get(DIGEST):
        raise StoreError(
            f"recorded step {str(path)!r}: its content does not match its hash, so it was changed "
            "or damaged after it was written; restore the file, or record the run again"
        )
    return state


def recorded_steps(folder: Path) -> list[StepFacts]:
    """Return the facts of the steps in a folder in order, checked to be those of one run.

    Raises:
        StoreError: A step is missing, belongs to another run, or cannot be read.
    """
    found = sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name))
    steps = [read_facts(path) for path in found]
    for position, (path, facts) in enumerate(zip(found, steps, strict=True)):
        if path != step_file(folder, facts.position) or facts.position != position:
            raise StoreError(
                f"recorded run {str(folder)!r}: step {position} is missing, {path.name!r} holds "
                f"step {facts.position}; restore the files, or record the run again"
            )
        if facts.run != steps[0].run:
            raise StoreError(
                f"recorded run {str(folder)!r}: {path.name!r} belongs to another run than the "
                "steps before it; each run needs a folder of its own"
            )
        if facts.ends and path != found[-1]:
            raise StoreError(
                f"recorded run {str(folder)!r}: the run ends at step {position}, and files of "
                "later steps lie beside it; each run needs a folder of its own"
            )
    return steps


def read_run(folder: str | Path, *, verify: bool = True) -> tuple[Checkpoint, ...]:
    """Return the checkpoints of a recorded run, ``Task(model, loss, checkpoints=read_run(...))``.

    Args:
        folder: Where `record` wrote it.
        verify: Compare every file with its hash, which reads it whole. Headers are always checked.

    Returns:
        The weights before each of the T steps, with learning rate and step, and those after the
        last, T + 1 in all.

    Raises:
        InputError: There is no run, or it did not end.
        StoreError: A file is missing, truncated, foreign or damaged.
    """
    folder = Path(folder)
    steps = recorded_steps(folder)
    if not steps:
        raise InputError(
            f"recorded run {str(folder)!r}: there is none; record one with "
            "dattri_unroll.record(model, optimizer, folder)"
        )
    if not steps[-1].ends:
        raise InputError(
            f"recorded run {str(folder)!r}: it was stopped after {len(steps)} steps, and the "
            "weights at its end are not known; go on with the training, from the weights of a "
            "recorded step and with the same folder, and leave record(...) without an error"
        )
    for facts in steps:
        if verify:
            read_weights(step_file(folder, facts.position))
        if facts.moments:
            require_moments(folder, facts.position, facts.moments, whole=verify)
    return tuple(_checkpoint(folder, facts, len(steps)) for facts in steps)


def _checkpoint(folder: Path, facts: StepFacts, count: int) -> Checkpoint:
    batch = None if facts.batch is None else torch.tensor(facts.batch, dtype=torch.long)
    path = step_file(folder, facts.position)
    return Checkpoint(
        path.name,
        facts.position,
        count,
        facts.learning_rate,
        path,
        step=TrainingStep(
            batch,
            facts.weight_decay,
            facts.epoch,
            facts.momentum,
            facts.dampening,
            facts.nesterov,
            facts.adam,
            facts.clip,
            facts.scale,
            facts.rates,
        ),
        optimiser=AdamState(moments_file(folder, facts.position)) if facts.moments else None,
    )


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _facts_of(path: Path, header: Mapping[str, str]) -> StepFacts:
    try:
        found: Any = json.loads(header[FACTS])
        return StepFacts(**found)
    except (KeyError, ValueError, TypeError) as error:
        raise StoreError(
            f"recorded step {str(path)!r}: its header does not say which step it is ({error!r}); "
            "it was not written by dattri_unroll.record; give each run a folder of its own"
        ) from error


def _unreadable(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"recorded step {str(path)!r}: is no whole safetensors file ({error}); restore the file, "
        "or record the run again"
    )


def _digest(text: str, state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"\x1f{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
