"""Notes on methods and parts that no docstring has: what they cost, and when to take them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from dattri_core.toml import read_toml

PATH = Path(__file__).with_name("notes.toml")


@cache
def notes() -> dict[str, dict[str, Any]]:
    """Return the notes: kind (``"method"`` too) -> name -> ``cost``, ``memory``, ``use``."""
    found: dict[str, dict[str, Any]] = read_toml(PATH.read_text(encoding="utf-8"))
    return found


def note_rows(kind: str, name: str) -> list[tuple[str, str]]:
    """Return the notes on one method or part as rows of a table; none where there is no note."""
    note = notes().get(kind, {}).get(name, {})
    titles = {"cost": "Cost", "memory": "Memory", "use": "When to use"}
    return [(f"**{title}**", note[key]) for key, title in titles.items() if key in note]
