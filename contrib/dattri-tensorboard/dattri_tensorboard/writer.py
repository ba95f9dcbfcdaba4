"""What a run or a cell becomes in TensorBoard: scalars to plot, and text to look things up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch.utils.tensorboard import SummaryWriter

_WRITERS: dict[str, SummaryWriter] = {}
_STEPS: Counter[str] = Counter()
"""How many points a tag has in this process: the step of the next one."""


def run(folder: str, info: Mapping[str, Any]) -> None:
    """Write one attribution: seconds, and train-test pairs a second, by method.

    Args:
        folder: Of the event files.
        info: Of the hook ``run_finished``.
    """
    provenance = info["provenance"]
    name = _method(info["method"])
    seconds = float(info["seconds"])
    pairs = provenance.get("n_train", 0) * provenance.get("n_test", 0)
    _scalar(folder, f"run/{name}/seconds", seconds)
    if pairs and seconds > 0:
        _scalar(folder, f"run/{name}/pairs_per_second", pairs / seconds)
    _text(folder, f"run/{name}/provenance", provenance)
    _writer(folder).flush()


def cell(folder: str, info: Mapping[str, Any]) -> None:
    """Write one cell: each number of its row by setting, metric and method; the seed is the step.

    Args:
        folder: Of the event files.
        info: Of the hook ``cell_finished``.
    """
    identity, row = info["cell"], info["row"]
    place = "/".join(_named(identity.get(key)) for key in ("metric", "method"))
    world = identity.get("world") or {}
    tag = f"{_named(world.get('setting'))}/{place}"
    for key, value in row.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _scalar(folder, f"{tag}/{key}", float(value), world.get("seed"))
    _text(folder, f"{tag}/{'error' if row.get('error') else 'cell'}", {**identity, "row": row})
    _writer(folder).flush()


def _method(spec: Any) -> str:
    """Return a short name of a method's spec: its parts in order, without those that do nothing."""
    if not isinstance(spec, Mapping):
        return str(spec)
    inverse = spec.get("inverse_hessian")
    slots = dict(inverse) if isinstance(inverse, Mapping) else {"inverse_hessian": inverse}
    slots = {**spec, "inverse_hessian": None, **slots}
    order = ("attributor", "projector", "inverse_hessian", "curvature", "solver", "scorer", "fold")
    words = [_named(slots.get(slot)) for slot in order]
    return "-".join(word for word in words if word not in ("-", "identity", "mean"))


def _named(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("name", "-")
    return str(value) if value else "-"


def _scalar(folder: str, tag: str, value: float, step: int | None = None) -> None:
    if step is None:
        step = _STEPS[tag]
        _STEPS[tag] += 1
    _writer(folder).add_scalar(tag, value, step)


def _text(folder: str, tag: str, value: Any) -> None:
    text = json.dumps(value, indent=1, default=str, sort_keys=True)
    _writer(folder).add_text(tag, "\n".join(f"    {line}" for line in text.splitlines()))


def _writer(folder: str) -> SummaryWriter:
    if folder not in _WRITERS:
        _WRITERS[folder] = SummaryWriter(folder)
    return _WRITERS[folder]
