"""The hooks that a plugin may implement: mark each with ``@dattri.hookimpl``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from dattri_core.registry import Registry

PROJECT = "dattri"
API_VERSION = 1
"""Raised when a plugin written for this version would not work with the one before."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Info = Mapping[str, Any]


@hookspec
def register(registry: Registry) -> None:
    """Name parts, methods and commands. Runs at start: strings only, import nothing heavy."""


@hookspec
def run_started(info: Info) -> None:
    """Hear that an attribution begins; ``info`` holds method, n_train, n_test and checkpoints."""


@hookspec
def block_scored(info: Info) -> None:
    """Hear that train rows were scored; ``info`` holds done and total."""


@hookspec
def run_finished(info: Info) -> None:
    """Hear that an attribution ended; ``info`` holds method, seconds and provenance."""


@hookspec
def cell_finished(info: Info) -> None:
    """Hear that one cell of a study ended; ``info`` holds the cell, its row and its seconds."""


EVENTS = ("run_started", "block_scored", "run_finished", "cell_finished")
HOOKS = ("register", *EVENTS)
