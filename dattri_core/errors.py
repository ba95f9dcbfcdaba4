"""Errors: each names the operation, what it got, what it expected and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DattriError(Exception):
    """Base of every error that this package raises on purpose."""


class SpecError(DattriError, ValueError):
    """A method, a part or a space that does not type-check; raised before any tensor is made."""


class InputError(DattriError, ValueError):
    """A model, loss, checkpoint or data set that cannot be attributed as it stands."""


class NumericsError(DattriError, ArithmeticError):
    """A number that is not finite, or a matrix that cannot be factorised."""


class MemoryBudgetError(DattriError, MemoryError):
    """Work that does not fit the memory it was given; carries the bytes it would need."""


class StoreError(DattriError, ValueError):
    """A file that is truncated, foreign, stale or unsafe to load."""


class PluginError(DattriError):
    """A plugin that is missing, broken, or that clashes with another."""


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped before it reached its tolerance."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Return 'did you mean ...' for the closest spellings, then all valid ones."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=count, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return f"{hint}valid: {', '.join(choices) if choices else '(none)'}"


def format_bytes(count: float) -> str:
    """Return a count of bytes with a binary unit, e.g. ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
