"""The file of Adam's moments before a step, beside the file of the step."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from dattri_core import AdamState, InputError, ParameterMoments, StoreError, atomic_file


def moments_file(folder: Path, position: int) -> Path:
    """Return the file of the moments before a step."""
    return folder / f"step-{position:08d}.moments.pt"


def held(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, ParameterMoments]:
    """Return the moments that an optimiser holds now; empty before its first step."""
    found = AdamState.of(optimizer, model).source
    assert isinstance(found, Mapping)
    return dict(found)


def write_moments(folder: Path, position: int, moments: Mapping[str, ParameterMoments]) -> str:
    """Write the moments before a step, whole or not at all, and return the SHA-256 of the file.

    It holds tensors and numbers alone, as `AdamState` reads them: the state dict of an optimiser
    whose parameters have the model's names. Where there are none, nothing is written.
    """
    if not moments:
        return ""
    groups: dict[tuple[tuple[float, float], float], list[str]] = {}
    for name, own in moments.items():
        groups.setdefault((own.betas, own.epsilon), []).append(name)
    state = {
        "state": {
            name: {
                "step": own.step,
                "exp_avg": own.first.cpu().contiguous(),
                "exp_avg_sq": own.second.cpu().contiguous(),
            }
            for name, own in moments.items()
        },
        "param_groups": [
            {"params": names, "betas": list(betas), "eps": epsilon, "amsgrad": False}
            for (betas, epsilon), names in groups.items()
        ],
    }
    written = io.BytesIO()
    torch.save(state, written)
    content = written.getbuffer()
    with atomic_file(moments_file(folder, position)) as handle:
        handle.write(content)
    return hashlib.sha256(content).hexdigest()


def require_moments(folder: Path, position: int, digest: str, *, whole: bool) -> None:
    """Raise `StoreError` unless the file of a step's moments is there, and as it was written.

    Args:
        folder: Of the run.
        position: Of the step.
        digest: Of the file, from the facts of the step.
        whole: Whether to read it.
    """
    path = moments_file(folder, position)
    if not path.is_file():
        raise StoreError(
            f"recorded run {str(folder)!r}: the moments of Adam before step {position} are "
            f"missing, expected {path.name!r}; restore the file, or record the run again"
        )
    if not whole:
        return
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise StoreError(
            f"recorded moments {str(path)!r}: the content does not match its hash, so it was "
            "changed or damaged after it was written; restore the file, or record the run again"
        )


def require_same(
    folder: Path, position: int, moments: Mapping[str, ParameterMoments], model: nn.Module
) -> None:
    """Refuse to go on at a step with other moments than were recorded there.

    Raises:
        InputError: The optimiser holds none, or others.
        StoreError: The file is damaged.
    """
    recorded = AdamState(moments_file(folder, position)).load(model)
    other = [
        name
        for name, own in recorded.items()
        if name not in moments
        or own.step != moments[name].step
        or not torch.equal(own.first, moments[name].first.cpu())
        or not torch.equal(own.second, moments[name].second.cpu())
    ]
    if other:
        raise InputError(
            f"record: a run of Adam goes on at step {position}, and the optimiser has other "
            f"moments than were recorded there, of {other[:6]}; load its state of that step "
            "(optimizer.load_state_dict) besides the weights, or record the run anew"
        )
