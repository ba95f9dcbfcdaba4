"""Influence along a recorded training run: the recorder, what is said of a run, and it again."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dattri_unroll.hugging_face import hugging_face_callback as hugging_face_callback
    from dattri_unroll.lightning import lightning_callback as lightning_callback
    from dattri_unroll.recorder import Recorder as Recorder
    from dattri_unroll.recorder import record as record
    from dattri_unroll.replay import RunRetraining as RunRetraining
    from dattri_unroll.run_folder import read_run as read_run

_EXPORTS = {
    "Recorder": "recorder",
    "RunRetraining": "replay",
    "hugging_face_callback": "hugging_face",
    "lightning_callback": "lightning",
    "read_run": "run_folder",
    "record": "recorder",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"dattri_unroll.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dattri_unroll' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
