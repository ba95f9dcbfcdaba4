"""The distribution: what the wheel holds, and what its metadata promises."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dattri_core.toml import read_toml

ROOT = Path(__file__).parents[1]
PROJECT = read_toml((ROOT / "pyproject.toml").read_text())
PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if path.is_dir())
PACKAGES = ["dattri_core", *PLUGINS]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel from a copy of what is shipped: building writes into its folder."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("dattri_core", "plugins", "tests", "contrib"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-index", "--wheel-dir", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module_and_data_file(wheel: zipfile.ZipFile) -> None:
    shipped = set(wheel.namelist())
    kinds = (".py", ".npz", ".typed")
    for root, packages in ((ROOT, ["dattri_core"]), (ROOT / "plugins", PLUGINS)):
        for package in packages:
            files = [p for p in (root / package).rglob("*") if p.suffix in kinds or p.stem == "py"]
            wanted = {p.relative_to(root).as_posix() for p in files if "__pycache__" not in p.parts}
            assert wanted <= shipped, wanted - shipped
            assert f"{package}/py.typed" in shipped
    assert any(name.endswith("digits.npz") for name in shipped)
    assert any(name.endswith("licenses/LICENSE") for name in shipped)


def test_the_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    # the templates of `dattri new-plugin` hold the tests of another distribution
    own = [name for name in wheel.namelist() if "/templates/" not in name]
    assert not [name for name in own if "test_" in name or "/tests/" in name]
    size = sum(info.compress_size for info in wheel.infolist())
    assert size < 2 * 2**20


def test_entry_points_and_script_name_modules_that_exist(wheel: zipfile.ZipFile) -> None:
    (path,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    text = wheel.read(path).decode()
    assert "dattri = dattri_core.cli:main" in text
    for plugin in PLUGINS:
        assert f"{plugin} = {plugin}.plugin" in text
        assert f"{plugin}/plugin.py" in wheel.namelist()


def test_the_metadata_promises_what_the_design_says(wheel: zipfile.ZipFile) -> None:
    (path,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    text = wheel.read(path).decode()
    assert "Requires-Python: >=3.10" in text
    required = {
        re.split(r"[<>=;! ]", line.split(": ")[1])[0]
        for line in text.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    }
    numbers = {"torch", "numpy", "scipy", "safetensors"}
    assert required == {*numbers, "pluggy", "attrs", "tomli", "typing-extensions"}
    extras = set(PROJECT["project"]["optional-dependencies"])
    assert {
        "plot",
        "hf",
        "table",
        "bench",
        "docs",
        "cuda",
        "fast_jl",
        "text",
        "test",
        "lint",
        "contrib",
    } == extras


def test_every_dependency_that_tests_use_is_pinned() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    optional = PROJECT["project"]["optional-dependencies"]
    wanted = list(PROJECT["project"]["dependencies"])
    wanted += [*optional["test"], *optional["lint"], *optional["contrib"]]
    names = {re.split(r"[<>=;! ]", requirement)[0] for requirement in wanted}
    # tomli is for Python 3.10 alone; pip and setuptools are whatever the environment builds with.
    assert names - {"tomli", "pip", "setuptools"} <= pinned


def test_what_the_distributions_in_contrib_adapt_is_installed_for_their_tests() -> None:
    needed = set()
    for path in (ROOT / "contrib").glob("*/pyproject.toml"):
        needed |= set(read_toml(path.read_text())["project"]["dependencies"])
    names = {re.split(r"[<>=;! ]", requirement)[0] for requirement in needed}
    optional = PROJECT["project"]["optional-dependencies"]["contrib"]
    assert set(optional) <= needed
    own = {"dattri-core", "torch", "attrs", "numpy"}
    assert names - own == {re.split(r"[<>=;! ]", each)[0] for each in optional}


def test_the_versions_agree() -> None:
    import dattri_core

    assert dattri_core.__version__ == PROJECT["project"]["version"]


def test_ci_runs_the_targets_that_exist() -> None:
    script = ROOT / ".ci" / "run"
    assert "make lint test" in script.read_text()
    assert script.stat().st_mode & 0o100
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {"demo", "test", "lint", "bench"} <= set(targets)
