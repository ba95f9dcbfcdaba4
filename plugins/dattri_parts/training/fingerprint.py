"""What outcomes depend on, as one hash."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dattri_core import InputError, map_tensors
from dattri_parts.training.description import Description

VERSION = "training-3"
"""Changes when this package would train another model by the same recipe."""
CHUNK = 32
"""Numbers that are judged together: two seeds do not draw so many alike by chance."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SAMPLES = 16
STEPS = 1000
"""Of the logarithm of a spread: a thousandth of it is told apart."""
OFFSET = 0.2718
"""Keeps borders of rounding away from powers of two, where the spreads of some starts lie."""


def fingerprint(
    recipe: Any,
    models: tuple[nn.Module, nn.Module],
    data: tuple[Any, Any],
    words: Mapping[str, Any],
    code: Any = None,
) -> str:
    """Return a hash of the data, what the model computes and starts from, the recipe and others.

    Which states are kept, devices, threads and how many are trained together are no part of it.

    Weights that two seeds share were loaded or set, and count bit by bit. Those that they do not
    share were drawn, and torch draws other last digits with other vector instructions; of these
    count the spread to a thousandth and a sample to the nearest spread, so that another processor
    gives the same hash.

    Args:
        recipe: A frozen attrs value; its field ``keep`` does not count.
        models: Built under two seeds, on the CPU; see `Description` for what of their code counts.
        data: Train and test, nests of tensors.
        words: What else there is, JSON-ready.
        code: What else is run, such as the functions of a loss.

    Raises:
        InputError: ``words`` holds something that JSON does not know.
    """
    first, second, other = Description(), Description(), Description()
    parts = {name: v for name, v in attrs.asdict(recipe).items() if name != "keep"}
    about = {
        "version": VERSION,
        "model": first.of(models[0]),
        "recipe": [other.of(type(recipe)), other.of(parts)],
        "code": other.of(code),
        "data": [digest_of(part) for part in data],
        "words": _plain(words),
    }
    second.of(models[1])
    pairs = zip_longest(first.tensors, second.tensors[: len(first.tensors)])
    about["state"] = [start_of(one, another) for one, another in pairs]
    about["held"] = [start_of(tensor, tensor) for tensor in other.tensors]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def start_of(one: Tensor, other: Tensor | None) -> list[Any]:
    """Return what counts of a tensor, from its values under two seeds.

    Args:
        one: Under the first seed.
        other: Under the second; None, or of another shape, where that has no such tensor.

    Returns:
        Type, shape, which chunks of `CHUNK` numbers are the same under both, a hash of these bit by
        bit, and of the others their spread and a sample, rounded.
    """
    kind = [str(one.dtype), list(one.shape)]
    if one.is_meta or one.numel() == 0:
        return kind
    flat = _flat(one)
    if not one.is_floating_point() and not one.is_complex():
        return [*kind, hashlib.sha256(_bytes(flat)).hexdigest()]
    same = torch.zeros(math.ceil(len(flat) / CHUNK), dtype=torch.bool)
    if other is not None and other.shape == one.shape and other.dtype == one.dtype:
        same = _same_chunks(flat, _flat(other))
    if same.all():
        return [*kind, "all", hashlib.sha256(_bytes(flat)).hexdigest()]
    if not same.any():
        return [*kind, "none", _drawn(flat)]
    fixed = same.repeat_interleave(CHUNK)[: len(flat)]
    places = hashlib.sha256(_bytes(same)).hexdigest()
    exact = hashlib.sha256(_bytes(flat[fixed])).hexdigest()
    return [*kind, places, exact, _drawn(flat[~fixed])]


def _same_chunks(flat: Tensor, other: Tensor) -> Tensor:
    """Return which chunks of two tensors have the same bits, those that are no numbers too."""
    bits = BITS[min(8, flat.element_size())]
    equal = (flat.view(bits) == other.view(bits)).reshape(len(flat), -1).all(1)
    short = -len(flat) % CHUNK
    return nn.functional.pad(equal, (0, short), value=True).reshape(-1, CHUNK).all(1)


def _drawn(values: Tensor) -> list[int]:
    """Return the spread of numbers and a sample of them, rounded."""
    wide = (torch.view_as_real(values) if values.is_complex() else values).flatten()
    spread = torch.linalg.vector_norm(wide, dtype=torch.float64).item() / math.sqrt(len(wide))
    if not 0 < spread < math.inf:
        return [0]
    places = torch.linspace(0, len(wide) - 1, SAMPLES).round().long()
    sample = torch.floor(wide[places].double() / spread + OFFSET).nan_to_num().long()
    return [math.floor(STEPS * math.log(spread) + OFFSET), *sample.tolist()]


def _plain(words: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(words), sort_keys=True)
    except TypeError as error:
        raise InputError(
            f"retraining: 'about' is {dict(words)!r}, which JSON cannot hold ({error}); give "
            "texts, numbers, lists and dicts of them"
        ) from error


def digest_of(data: Any) -> str:
    """Return a hash of a nest of tensors, bit by bit."""
    state = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(_bytes(_flat(tensor)))
        return tensor

    state.update(repr(map_tensors(lambda tensor: None, data)).encode())  # the nest itself
    map_tensors(add, data)
    return state.hexdigest()


def _flat(tensor: Tensor) -> Tensor:
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return dense.detach().cpu().resolve_conj().contiguous().reshape(-1)


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
