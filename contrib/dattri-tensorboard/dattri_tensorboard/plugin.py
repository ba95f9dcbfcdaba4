"""Listens to runs and cells, and hands them to the writer when a folder is named.

The environment variable ``DATTRI_TENSORBOARD`` names it; without it nothing is imported or written.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import dattri_core as dattri

dattri_api_version = 1
FOLDER = "DATTRI_TENSORBOARD"


@dattri.hookimpl
def run_finished(info: Mapping[str, Any]) -> None:
    """Write the seconds of an attribution, its method and its provenance."""
    _tell("run", info)


@dattri.hookimpl
def cell_finished(info: Mapping[str, Any]) -> None:
    """Write the value of a cell of a benchmark or a study, with its interval."""
    _tell("cell", info)


def _tell(what: str, info: Mapping[str, Any]) -> None:
    folder = os.environ.get(FOLDER)
    if folder:
        # At the first event, since a plugin imports nothing heavy when dattri starts.
        getattr(importlib.import_module("dattri_tensorboard.writer"), what)(folder, info)
