"""Worlds of the benchmarks, made once and kept, and the tables that a run fills."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import making
import pytest
from processes import ROOT
from table import Table, Theme

from dattri_core import DattriError, default_registry

KEPT = ROOT / ".benchmarks" / "worlds"
"""Delete it when the making of a world changes; ``make clean`` does."""


@pytest.fixture(scope="session")
def worlds() -> Callable[..., Path]:
    """Return a function (data set, sizes ...) -> path of the saved world; see `making`."""

    def get(data: str, *sizes: Any) -> Path:
        words = ["-".join(map(str, s)) or "lr" if isinstance(s, tuple) else str(s) for s in sizes]
        path = KEPT / f"{'_'.join([data, *words])}.npz"
        if not path.exists():
            try:
                making.MAKERS[data](path, *sizes)
            except DattriError as error:
                pytest.skip(f"{data} is not at hand (set DATTRI_DATA): {error}")
        return path

    return get


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Table:
    """Return the table of the test module's THEME."""
    theme: Theme = request.module.THEME
    return Table(theme)


@pytest.fixture
def row(table: Table) -> Any:
    """Return a function that adds a line (measured, against, ratio, goal, met) to the table."""

    def add(what: str, measured: str, against: str, ratio: float, goal: str, met: bool) -> None:
        table.put(what, measured=measured, against=against, ratio=ratio, goal=goal, met=met)

    return add


@pytest.fixture
def registered() -> Callable[[str, str], None]:
    """Return a function that skips the test when a kind of thing has no such name."""

    def require(kind: str, name: str) -> None:
        if name not in default_registry().names(kind):
            pytest.skip(f"no {kind} named {name!r} is registered")

    return require
