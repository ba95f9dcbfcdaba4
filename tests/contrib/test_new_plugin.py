"""``dattri new-plugin``: what it writes passes ruff, mypy, its own tests and the laws at once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dattri_scaffold.command import write_folder
from dattri_scaffold.names import LONGEST
from dattri_scaffold.templates import KINDS, WITHOUT_METHOD
from environment import Environment, copied

from dattri_core import cli
from dattri_core.toml import read_toml

ROOT = Path(__file__).parents[2]


def new_plugin(name: str, kind: str, into: Path) -> Path:
    assert cli.main(["new-plugin", name, "--kind", kind, "--into", str(into)]) == 0
    return into / f"dattri-{name}"


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a new plugin of each kind."""
    folder = tmp_path_factory.mktemp("projects")
    return {kind: new_plugin(f"my-{kind}", kind, folder) for kind in KINDS}


@pytest.fixture(scope="module")
def beside(projects: dict[str, Path]) -> str:
    """Return a path on which all of them are found, as after an editable installation."""
    for folder in projects.values():
        project = read_toml((folder / "pyproject.toml").read_text())["project"]
        metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        ((name, module),) = project["entry-points"]["dattri"].items()
        (metadata / "entry_points.txt").write_text(f"[dattri]\n{name} = {module}\n")
    return os.pathsep.join([*map(str, projects.values()), *filter(None, sys.path)])


@pytest.fixture(scope="module")
def environment(
    tmp_path_factory: pytest.TempPathFactory, projects: dict[str, Path]
) -> Iterator[Environment]:
    """Yield where one of them is installed with pip; then it is uninstalled, and gone."""
    made = Environment(tmp_path_factory.mktemp("environment"))
    made.install(copied(projects["fold"], tmp_path_factory.mktemp("copies")))
    yield made
    made.pip("uninstall", "--yes", "dattri-my-fold")
    assert "my-fold" not in made.dattri("methods") + made.dattri("plugins")


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_it_says_what_it_wrote_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = new_plugin("soft", "scorer", tmp_path)
    said = capsys.readouterr().out
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == set(re.findall(r"^  ([\w./]*\.\w+|LICENSE)$", said, re.M))
    assert {"LICENSE", "README.md", ".github/workflows/tests.yml", "tests/test_laws.py"} <= files
    assert "dattri check dattri-soft" in said
    assert list(tmp_path.iterdir()) == [folder]  # nothing unfinished beside it
    for path in folder.rglob("*"):
        if path.is_file():
            assert not re.search(r"\$\w|PACKAGE|\$\{\w", path.read_text()), path
    assert "${{ matrix.python }}" in (folder / ".github/workflows/tests.yml").read_text()


def test_it_is_formatted_and_lint_free_whatever_the_name(tmp_path: Path) -> None:
    for kind in KINDS:
        for name in ("a1", "n" * LONGEST):
            folder = new_plugin(name, kind, tmp_path / kind)
            project = read_toml((folder / "pyproject.toml").read_text())["project"]
            package = project["name"].replace("-", "_")
            assert project["entry-points"]["dattri"] == {package: f"{package}.plugin"}
    # Each folder has settings of its own, which ruff finds.
    for command in (("check",), ("format", "--check", "--diff")):
        run(sys.executable, "-m", "ruff", *command, "--no-cache", ".", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_typed_strictly(kind: str, projects: dict[str, Path]) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "plugins")])
    command = (sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent")
    # The cache of the project's own check knows torch already.
    cache = ("--cache-dir", str(ROOT / ".mypy_cache"))
    run(*command, *cache, cwd=projects[kind], MYPYPATH=path)


def test_all_kinds_are_found_and_their_numbers_are_right(
    beside: str, projects: dict[str, Path], tmp_path: Path
) -> None:
    listed = run(sys.executable, "-m", "dattri_core", "plugins", cwd=tmp_path, PYTHONPATH=beside)
    for kind in KINDS:
        parts, methods = 0 if kind == "method" else 1, 0 if kind in WITHOUT_METHOD else 1
        brought = rf"{parts} parts?, {methods} method"
        assert re.search(rf"dattri-my-{kind} 0\.1\.0 +loaded +{brought}", listed)
    # In one process, since most of the time goes into importing torch.
    for kind, folder in projects.items():
        shutil.copy(folder / "tests/test_oracle.py", tmp_path / f"test_{kind}.py")
        if (folder / "tests/world.py").exists():
            shutil.copy(folder / "tests/world.py", tmp_path)
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert "skipped" not in run(*pytest_, cwd=tmp_path, PYTHONPATH=beside)


def test_installed_with_pip_its_laws_hold_as_tests_and_as_a_command(
    environment: Environment, projects: dict[str, Path]
) -> None:
    checked = environment.dattri("check", "dattri-my-fold")
    assert checked.endswith("dattri check dattri-my-fold: passed\n")
    ran = sum(map(int, re.findall(r": (\d+) run", checked)))
    test = ("-m", "pytest", "-p", "no:cacheprovider", "tests/test_laws.py")
    done = environment.run(*test, cwd=projects["fold"])
    assert f"{ran} passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_its_tests_pass(kind: str, beside: str, projects: dict[str, Path]) -> None:
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    run(*pytest_, cwd=projects[kind], PYTHONPATH=beside)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SoftCosine", "it has capital letters. *'soft-cosine', say"),
        ("soft_cosine", "it has '_'. *'soft-cosine', say"),
        ("soft cosine", "it has ' '. *'soft-cosine', say"),
        ("2nd-order", "it begins with a digit. *'nd-order', say"),
        ("soft--cosine", "it has a hyphen at an end, or two together"),
        ("", "it is empty. *as in 'soft-cosine'"),
        ("dattri-", "it is empty"),
        ("n" * (LONGEST + 1), f"has {LONGEST + 1} letters; give at most {LONGEST}"),
        ("cosine", "the name 'cosine' is taken: dattri-core .* has a scorer of that name"),
        ("grad-dot", "dattri-core .* has a method of that name"),
        ("core", "dattri-core .* is installed; choose another name, or uninstall it first"),
        ("parts", "Python finds a package 'dattri_parts' already"),
        ("../escape", "it has '\\.'"),
    ],
)
def test_a_name_that_cannot_be_is_refused_with_the_reason(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["new-plugin", name, "--into", str(tmp_path / "x")]) == 2
    assert re.search(said.replace(". *", ".*"), capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_kind_without_a_template_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["new-plugin", "mine", "--kind", "sorcer"]) == 2
    said = capsys.readouterr().err
    assert "no template for the kind 'sorcer'; did you mean 'source' or 'scorer'" in said
    assert "docs/plugins.md" in said


def test_a_folder_that_is_there_is_never_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = new_plugin("soft", "scorer", tmp_path)
    (folder / "README.md").write_text("mine")
    assert cli.main(["new-plugin", "soft", "--into", str(tmp_path)]) == 2
    assert "exists; delete it, or choose another name" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "mine"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    texts: dict[str, Any] = {"a.txt": "one", "b.txt": 2}
    with pytest.raises(TypeError):
        write_folder(tmp_path / "made", texts)
    assert not list(tmp_path.iterdir())
