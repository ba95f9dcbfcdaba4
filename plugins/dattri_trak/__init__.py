"""TRAK and TrackStar: sketched gradients, of margins or of losses, and ensembles of models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dattri_trak.ensemble import train_ensemble as train_ensemble

_EXPORTS = {"train_ensemble": "ensemble"}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"dattri_trak.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dattri_trak' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
