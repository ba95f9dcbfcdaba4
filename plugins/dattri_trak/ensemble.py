"""Ensembles: models trained by one recipe on random subsets, or on all data by other seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dattri_parts.training import random_subsets
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dattri_core import InputError, StoreError, atomic_file

Train = Callable[[Tensor, int], Mapping[str, Tensor]]
SETTINGS = "dattri_ensemble"
"""Key in the header of a member's file of what it was made with."""


def train_ensemble(
    train: Train,
    folder: str | Path,
    *,
    n: int,
    members: int,
    fraction: float = 0.5,
    seed: int = 0,
) -> list[Path]:
    """Train the members of an ensemble that are not in the folder yet, and return their files.

    Member m is trained on the m-th of ``random_subsets(n, members, fraction=..., seed=...)``, a
    function of (n, fraction, seed, m) alone, so that an ensemble can grow. Each file appears whole,
    so that a run that was stopped goes on with the first member that is missing. Use them as
    ``Task(model, checkpoints=train_ensemble(...))``, or by the name of the folder.

    Source: Park et al. 2023, TRAK, section 3.2 (arXiv 2303.14186), with fraction 0.5; fraction 1
    trains all members on all examples by independent seeds.

    Args:
        train: ``(indices [k], seed) -> state dict``: trains a new model on the examples at these
            positions, in rising order; all its random numbers come from the seed, below 2^32.
        folder: Of ``member-00000.safetensors`` and so on; made where there is none.
        n: Examples of the whole train set.
        members: Of the ensemble.
        fraction: Of the examples that a member is trained on, in (0, 1].
        seed: Of the ensemble.

    Returns:
        One path for each member, in order.

    Raises:
        InputError: A setting is out of range, or ``train`` returns anything but tensors by name.
        StoreError: A member that is there was made with other settings, or cannot be read.
    """
    if members < 1:
        raise InputError(f"ensemble: members is {members}; give 1 or more")
    paths = [Path(folder) / f"member-{member:05d}.safetensors" for member in range(members)]
    wanted = [
        {"n": n, "fraction": fraction, "seed": seed, "member": member} for member in range(members)
    ]
    subsets = random_subsets(n, members, fraction=fraction, seed=seed)
    for path, settings in zip(paths, wanted, strict=True):
        if path.exists():
            _require_same(path, settings)
    for member, (path, settings) in enumerate(zip(paths, wanted, strict=True)):
        if path.exists():
            continue
        indices = torch.from_numpy(np.flatnonzero(subsets[member].mask))
        state = _tensors(train(indices, subsets[member].seed), member)
        with atomic_file(path) as handle:
            handle.write(save(state, metadata={SETTINGS: json.dumps(settings)}))
    return paths


def _tensors(state: Any, member: int) -> dict[str, Tensor]:
    """Return copies of a state's tensors: those of tied weights share their numbers."""
    if not isinstance(state, Mapping) or not state:
        raise InputError(
            f"ensemble: train returned a {type(state).__name__} for member {member}; expected "
            "model.state_dict()"
        )
    foreign = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise InputError(
            f"ensemble: the state of member {member} holds things that are no tensors: "
            f"{foreign[:8]}; return model.state_dict()"
        )
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def _require_same(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        with safe_open(str(path), framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(SETTINGS, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(
            f"ensemble {str(path)!r}: cannot be read ({error}); delete this file to train the "
            "member again"
        ) from error
    if found != settings:
        raise StoreError(
            f"ensemble {str(path)!r}: it was made with {found}, not with {dict(settings)}; give "
            "another folder, or delete its members"
        )
