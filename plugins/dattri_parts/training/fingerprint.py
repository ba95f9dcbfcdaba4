"""What outcomes depend on, as one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dattri_core import InputError, map_tensors

VERSION = "training-1"
"""Changes when this package would train another model by the same recipe."""


def fingerprint(
    recipe: Any,
    model: nn.Module,
    data: tuple[Any, Any],
    words: Mapping[str, Any],
) -> str:
    """Return a hash of the data, the model's architecture and start, the recipe and other words.

    Which states are kept, devices, threads and how many are trained together are no part of it.

    Args:
        recipe: A frozen attrs value; its field ``keep`` does not count.
        model: As built under a fixed seed. Its modules, their numbers and names, and the spread of
            its initial weights to two digits count: enough to tell initialisations apart, and not
            so fine that another processor gives another hash.
        data: Train and test, nests of tensors.
        words: What else there is, JSON-ready.

    Raises:
        InputError: ``words`` holds something that JSON does not know.
    """
    parts = {name: v for name, v in attrs.asdict(recipe).items() if name != "keep"}
    about = {
        "version": VERSION,
        "recipe": {"kind": type(recipe).__name__, **parts},
        "model": [[n, type(m).__qualname__, _numbers(m)] for n, m in model.named_modules()],
        "state": [_summary(name, tensor) for name, tensor in model.state_dict().items()],
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
        "data": [_digest(part) for part in data],
        "words": dict(words),
    }
    try:
        text = json.dumps(about, sort_keys=True)
    except TypeError as error:
        raise InputError(
            f"retraining: 'about' is {dict(words)!r}, which JSON cannot hold ({error}); give "
            "texts, numbers, lists and dicts of them"
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of a module: a share of dropout, an epsilon, a stride."""
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _summary(name: str, tensor: Tensor) -> list[Any]:
    spread = f"{tensor.detach().double().square().mean().sqrt().item():.1e}"
    return [name, str(tensor.dtype), list(tensor.shape), spread]


def _digest(data: Any) -> str:
    state = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return tensor

    state.update(repr(map_tensors(lambda tensor: None, data)).encode())  # the nest itself
    map_tensors(add, data)
    return state.hexdigest()
