"""Tables of results: rows of one theme in a JSON file, shown as Markdown beside it.

A row has a key; measured again it is replaced, so that a table can be filled piece by piece.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dattri_parts.measuring.machine import hardware

FOLDER = Path(os.environ.get("DATTRI_BENCH_TABLE", ".benchmarks/tables"))


@dataclass(frozen=True)
class Theme:
    """A table: the name of its files, its title and what there is to know about it."""

    name: str
    title: str
    about: str


class Table:
    """The rows of a theme, in the folder that DATTRI_BENCH_TABLE names."""

    def __init__(self, theme: Theme, folder: Path = FOLDER) -> None:
        self.theme, self.folder = theme, folder

    def rows(self) -> dict[str, dict[str, Any]]:
        """Return the rows by key, in the order in which they were first measured."""
        if not self._path.exists():
            return {}
        rows: dict[str, dict[str, Any]] = json.loads(self._path.read_text())
        return rows

    def put(self, key: str, **cells: Any) -> None:
        """Add a row, or replace the one of the same key, and write the files."""
        rows = {**self.rows(), key: {**cells, "machine": machine()}}
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(rows, indent=1) + "\n")
        part.rename(self._path)
        self._path.with_suffix(".md").write_text(self._markdown(rows))

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.theme.name}.json"

    def _markdown(self, rows: dict[str, dict[str, Any]]) -> str:
        titles = list(dict.fromkeys(t for row in rows.values() for t in row if t != "machine"))
        machines = list(dict.fromkeys(row["machine"] for row in rows.values()))
        marks = [f" ({at + 1})" if len(machines) > 1 else "" for at in range(len(machines))]
        command = (
            f"Command: `make bench DATTRI_BENCH_TABLE=docs/results ARGS='-k {self.theme.name}'`, "
            "with `DATTRI_DATA` at the folder of data sets and `DATTRI_PEERS_PYTHON` at a Python "
            "that has dattri 0.3.0, pyDVL 0.10.0 and kronfluence 1.0.1."
        )
        caution = (
            "Both sides of a ratio were measured in one run; times vary by tens of percent between "
            "runs."
        )
        lines = [
            f"# {self.theme.title}",
            "",
            command,
            "",
            self.theme.about,
            "",
            *(f"{m}{mark}." for m, mark in zip(machines, marks, strict=True)),
            caution,
            "",
            "| what | " + " | ".join(titles) + " |",
            "|" + "---|" * (1 + len(titles)),
        ]
        for key, row in rows.items():
            cells = [_cell(row.get(title, "")) for title in titles]
            mark = marks[machines.index(row["machine"])]
            lines.append(f"| {_cell(key)}{mark} | " + " | ".join(cells) + " |")
        return "\n".join([*lines, ""])


def machine() -> str:
    """Return where the numbers come from."""
    accelerator = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{accelerator}{os.cpu_count()} cores ({hardware()['processor']}, {platform.machine()}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return " ".join(str(value).split()).replace("|", "/")


def seconds(value: float) -> str:
    """Return a time for people."""
    return f"{value:.3f} s" if value < 1 else f"{value:.1f} s"


def mib(value: float) -> str:
    """Return an amount of memory for people."""
    return f"{value:.0f} MiB"
