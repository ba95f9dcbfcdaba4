"""A third party's plugin: installed with pip, found, run, checked, and gone once uninstalled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from environment import Environment, copied

ROOT = Path(__file__).parents[2]
NAME = "dattri-tempered-cosine"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the distribution."""
    return copied(ROOT / "contrib" / NAME, tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Iterator[Environment]:
    made = Environment(tmp_path_factory.mktemp("environment"))
    assert "tempered-cosine" not in made.dattri("methods") + made.dattri("parts")
    made.install(source)
    yield made
    made.pip("uninstall", "--yes", NAME)
    assert "tempered-cos" not in made.dattri("methods") + made.dattri("parts")
    assert NAME not in made.dattri("plugins")


def test_it_is_found_through_its_entry_point(environment: Environment) -> None:
    line = next(line for line in environment.dattri("plugins").splitlines() if NAME in line)
    assert "0.1.0  loaded  1 parts, 1 methods" in line
    listed = environment.dattri("methods").splitlines()
    assert ["grad-tempered-cos", NAME] in [line.split()[:2] for line in listed]
    shown = environment.dattri("show", "grad-tempered-cos")
    for part in (
        "formula",
        "citation",
        "tempered-cosine",
        "scorer.train_power",
        'scorer = "tempered-cosine"',
    ):
        assert part in shown, shown


def test_check_passes_for_its_part_and_all_of_it(environment: Environment) -> None:
    for name in ("tempered-cosine", NAME):
        assert environment.dattri("check", name).endswith(f"dattri check {name}: passed\n")


def test_it_runs_from_a_spec(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(
        "import torch, dattri_core as d\n"
        "def make(n):\n"
        "    model = torch.nn.Linear(3, 2)\n"
        "    x, y = torch.randn(n, 3), torch.arange(n) % 2\n"
        "    return d.Task(model, 'cross-entropy'), (x, y), (x[:2], y[:2])\n"
    )
    (tmp_path / "run.toml").write_text(
        'method = "grad-tempered-cos"\noutput = "unused"\n[setting]\nname = "toy:make"\nn = 6\n'
    )
    output = tmp_path / "scores"
    said = environment.dattri("run", str(tmp_path / "run.toml"), "--output", str(output))
    assert f"saved to {output}" in said
    code = f"import dattri_core as d; s = d.Scores.load({str(output)!r}); print(*s.values.shape)"
    assert environment.run("-c", code).stdout.split() == ["6", "2"]


def test_it_can_be_turned_off(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        f"import os; os.environ['DATTRI_PLUGINS'] = '-{NAME}'\n"
        "from dattri_core.registry import default_registry\n"
        "print(default_registry().names('scorer'))"
    )
    assert "tempered-cosine" not in environment.run("-c", code).stdout
