"""Each distribution in contrib: installed with pip, tested, checked, and gone once uninstalled.

None of their libraries is needed: tests that do are skipped by the distribution with a reason.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from environment import Environment, copied

from dattri_core.toml import read_toml

FOLDERS = sorted(p.parent for p in (Path(__file__).parents[2] / "contrib").glob("*/pyproject.toml"))
OTHERS = {
    "dattri-captum": "captum",
    "dattri-curvlinops": "curvlinops",
    "dattri-faiss": "faiss",
    "dattri-tensorboard": "tensorboard",
}
"""Distributions that adapt a library, and its module."""


def project_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_toml((folder / "pyproject.toml").read_text())["project"]
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """Yield where all of them are installed; then they are uninstalled."""
    made = Environment(tmp_path_factory.mktemp("environment"))
    sources = tmp_path_factory.mktemp("sources")
    made.install(*(copied(folder, sources) for folder in FOLDERS))
    yield made
    names = [folder.name for folder in FOLDERS]
    made.pip("uninstall", "--yes", *names)
    left = made.dattri("methods") + made.dattri("parts") + made.dattri("plugins")
    assert not [name for name in names if name in left]


def test_there_are_some_for_each_need() -> None:
    assert set(OTHERS) | {"dattri-tempered-cosine"} == {folder.name for folder in FOLDERS}
    for folder in FOLDERS:
        project = project_of(folder)
        assert project["name"] == folder.name
        assert project["license"] == "MIT"
        assert (folder / "README.md").read_text().startswith(f"# {folder.name}\n")
        module = folder.name.replace("-", "_")
        assert (folder / module / "py.typed").exists()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_is_found_and_named_with_its_version(folder: Path, environment: Environment) -> None:
    project = project_of(folder)
    line = rf"{folder.name} {re.escape(project['version'])} +loaded"
    assert bool(re.search(line, environment.dattri("plugins"))) == ("entry-points" in project)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_its_own_tests_pass(folder: Path, environment: Environment, tmp_path: Path) -> None:
    """Its tests hold the laws too."""
    library = OTHERS.get(folder.name)
    test = ("-m", "pytest", "-o", "addopts=", "-q", "-rs", "-p", "no:cacheprovider")
    done = environment.run(*test, str(copied(folder / "tests", tmp_path)), cwd=tmp_path)
    # 5: all of them need the library, and none is there.
    assert done.returncode in ((0, 5) if library else (0,)), done.stdout + done.stderr
    if library and importlib.util.find_spec(library) is None:
        assert "pip install" in done.stdout  # the reason says what would run them
        pytest.skip(f"{library} is not installed, so what needs it is not tested")
    assert re.search(r"\d+ passed", done.stdout)
