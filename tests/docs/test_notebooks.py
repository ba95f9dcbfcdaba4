"""Every notebook runs from top to bottom, and prints what it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from generating import notebooks

PATHS = sorted(notebooks.FOLDER.glob("*.ipynb"))
TOLERANCE = 0.1
"""Of printed numbers with a decimal point: training ends elsewhere on another machine."""


def alike(expected: str, got: str) -> bool:
    """Compare texts word by word, numbers with a decimal point up to the tolerance."""
    pairs = (expected.split(), got.split())
    return len(pairs[0]) == len(pairs[1]) and all(map(_same, *pairs))


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        near = abs(float(one.strip(";,")) - float(other.strip(";,"))) <= TOLERANCE + 1e-9
    except ValueError:
        return False
    return near and "." in one and "." in other


def test_there_are_notebooks() -> None:
    assert len(PATHS) >= 2


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_prints_what_it_holds(path: Path) -> None:
    notebook = notebooks.read(path)
    cells = notebooks.cells_of(notebook, "code")
    assert any(notebooks.printed_in(cell) for cell in cells)
    for number, (cell, got) in enumerate(zip(cells, notebooks.run(notebook), strict=True), start=1):
        expected = notebooks.printed_in(cell)
        assert alike(expected, got), f"cell {number} holds\n{expected}\nand printed\n{got}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_notebook_is_a_notebook(path: Path) -> None:
    notebook = notebooks.read(path)
    assert notebook["nbformat"] == 4
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))
    for number, cell in enumerate(notebooks.cells_of(notebook, "code"), 1):
        assert cell["execution_count"] == number


def _notebook(*sources: str) -> dict[str, object]:
    return {"cells": [{"cell_type": "code", "source": [s], "outputs": []} for s in sources]}


def test_a_run_begins_in_an_empty_folder_and_leaves_nothing(tmp_path: Path) -> None:
    source = "from pathlib import Path\nprint(list(Path().iterdir()))\nPath('a').touch()"
    before = Path.cwd()
    assert notebooks.run(_notebook(source, "print(Path('a').exists())")) == ["[]\n", "True\n"]
    assert Path.cwd() == before and not Path("a").exists()


def test_what_a_run_prints_is_filled_in() -> None:
    (first, second) = notebooks.filled(_notebook("print(1)\nprint(2)", "x = 1"))["cells"]
    assert notebooks.printed_in(first) == "1\n2\n" and first["execution_count"] == 1
    assert second["outputs"] == [] and second["execution_count"] == 2


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("a 0.90", "a  0.85", True),
        ("a 0.90;", "a 0.7;", False),
        ("a 9", "a 8", False),
        ("a 1", "a 1 2", False),
        ("a", "b", False),
    ],
)
def test_alike(expected: str, got: str, same: bool) -> None:
    assert alike(expected, got) is same
