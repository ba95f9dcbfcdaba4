"""Notebooks without a notebook server: run, filled with what they print, and shown as pages."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generating.markdown import code, page

FOLDER = Path(__file__).parents[1] / "notebooks"


def notebook_pages() -> dict[str, str]:
    """Return each notebook as a page, by its path."""
    return {f"notebooks/{p.stem}.md": page(_page(p)) for p in sorted(FOLDER.glob("*.ipynb"))}


def read(path: Path) -> dict[str, Any]:
    """Return a notebook as data."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def write(path: Path, notebook: dict[str, Any]) -> None:
    """Write a notebook as Jupyter does."""
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def cells_of(notebook: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return its cells of a kind, ``"code"`` or ``"markdown"``."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def printed_in(cell: dict[str, Any]) -> str:
    """Return what a cell of code has printed."""
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def run(notebook: dict[str, Any]) -> list[str]:
    """Run the code cells from the first to the last, in an empty folder.

    Returns:
        What each prints.
    """
    with tempfile.TemporaryDirectory() as folder, _working_in(folder):
        return list(_printed(notebook))


def _printed(notebook: dict[str, Any]) -> Iterator[str]:
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells_of(notebook, "code"), 1):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("".join(cell["source"]), f"<cell {number}>", "exec"), names)
        yield output.getvalue()


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def filled(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return the notebook with what its cells print now."""
    for number, (cell, text) in enumerate(
        zip(cells_of(notebook, "code"), run(notebook), strict=True), 1
    ):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}
        cell["outputs"] = [stream] if text else []
        cell["execution_count"] = number
    return notebook


def _page(path: Path) -> Iterator[str]:
    cells = read(path)["cells"]
    for position, cell in enumerate(cells):
        source = "".join(cell["source"]).rstrip()
        if position:
            yield ""
        if cell["cell_type"] == "markdown":
            yield source
        else:
            yield from code(source, "python")
            if printed_in(cell):
                yield ""
                yield from code(printed_in(cell).rstrip())
        if position == 0:
            yield ""
            yield f"This page is a notebook: [{path.name}]({path.name}). Its test runs every cell."
