"""Documents: the tokens of every example of a data set of texts or of token ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dattri_core import Examples, SpecError

BATCH = 256
WORDS = r"(?u)\b\w+\b"
"""A word of a text: as many letters, digits and underscores as come together."""
TEXT_KEYS = ("text", "input_ids")
MASK = "attention_mask"


def read_documents(examples: Examples, words: str) -> list[list[str]]:
    """Return the tokens of every example: words of a text, in lower case, or token ids as they are.

    An example is a text, or token ids ``[T]``; or a tuple that begins with one, or a mapping that
    has one under ``"text"`` or ``"input_ids"``. Positions whose ``"attention_mask"`` is 0 are
    padding and left out.

    Args:
        examples: The data set.
        words: Regular expression of a word; for texts alone.

    Raises:
        SpecError: The examples are neither texts nor token ids.
    """
    found: list[list[str]] = []
    pattern = re.compile(words)
    for _, batch in examples.batches(BATCH):
        held = _held(batch)
        if isinstance(held, Tensor):
            found += _of_ids(held, batch, examples.name)
        elif _is_texts(held):
            found += [pattern.findall(text.lower()) for text in held]
        else:
            raise _neither(examples.name, f"a {type(held).__name__}")
    return found


def _held(batch: Any) -> Any:
    """Return the texts or token ids of a batch."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in TEXT_KEYS if key in batch), None)
    if isinstance(batch, (tuple, list)) and batch and not _is_texts(batch):
        return batch[0]
    return batch


def _is_texts(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(text, str) for text in value)


def _of_ids(ids: Tensor, batch: Any, name: str) -> list[list[str]]:
    if ids.dim() != 2 or ids.is_floating_point():
        raise _neither(name, f"{ids.dtype} of shape {tuple(ids.shape)}")
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return [
        [str(token) for token in row[keep].tolist()] for row, keep in zip(ids, kept, strict=True)
    ]


def _neither(name: str, got: str) -> SpecError:
    return SpecError(
        f"{name} data: got {got}; a baseline for text takes texts (str) or token ids (integers "
        "[B, T]), alone, first in a tuple, or in a mapping under 'text' or 'input_ids'"
    )
