"""The page for those who come from other packages: our names and theirs are right."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from doc_blocks import DOCS

import dattri_core
from dattri_core import method

TEXT = (DOCS / "moving.md").read_text(encoding="utf-8")
PACKAGES = {"dattri": "dattri", "kronfluence": "kronfluence", "TRAK": "trak", "captum": "captum"}


def rows_of(section: str) -> list[tuple[str, str]]:
    """Return the cells of the table of a section, its head left out."""
    text = TEXT.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [(left, right) for left, right in rows][1:]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


CALLS = [
    span
    for section in PACKAGES
    for _, right in rows_of(section)
    for span in spans(right)
    if span.startswith("method(") and "..." not in span
]


def test_every_section_has_a_table() -> None:
    assert all(len(rows_of(section)) >= 8 for section in PACKAGES)
    assert len(CALLS) >= 30


@pytest.mark.parametrize("call", CALLS)
def test_every_method_can_be_made(call: str) -> None:
    expression = re.sub(r"\)\.fit\(task, train\)$", ")", call)
    if "fast-jl" in expression:
        pytest.importorskip("fast_jl")
    made = eval(expression, {"method": method, "r": 0.5})
    assert made is not None
    if "=r" in expression:
        assert "0.5" in str(made.to_spec())


def test_names_of_ours_exist() -> None:
    import dattri_metrics
    import dattri_unroll
    from dattri_parts import training
    from dattri_retrain import CounterfactualStore

    right = " ".join(cell for section in PACKAGES for _, cell in rows_of(section))
    for name in ("lds", "loo_correlation", "brittleness", "auroc"):
        assert f"{name}`" in right and hasattr(dattri_metrics, name)
    for name in ("leave_one_out", "random_subsets"):
        assert f"`{name}`" in right and hasattr(training, name)
    assert hasattr(dattri_unroll, "record") and hasattr(CounterfactualStore, "outcomes")
    for name in ("attribute", "self_influence", "extremes"):
        assert f"`.{name}(" in right and hasattr(dattri_core.FittedMethod, name)
    for name in ("functional", "Loss", "Target", "Task", "Scores"):
        assert hasattr(dattri_core, name)


@pytest.mark.peers
@pytest.mark.parametrize("section", PACKAGES)
def test_names_of_theirs_stand_in_their_sources(section: str) -> None:
    """Every name in a left column is a word of the package's sources."""
    python = os.environ.get("DATTRI_PEERS_PYTHON")
    if python is None:
        pytest.skip("DATTRI_PEERS_PYTHON names no Python with the other packages")
    code = (
        "import importlib.util as u, json;"
        f"print(json.dumps(u.find_spec({PACKAGES[section]!r}).submodule_search_locations[0]))"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"{PACKAGES[section]} is not installed there")
    files = Path(json.loads(found.stdout)).rglob("*.py")
    words = set(re.findall(r"\w+", "\n".join(file.read_text("utf-8") for file in files)))
    left = [span for cell, _ in rows_of(section) for span in spans(cell)]
    names = {word for span in left for word in re.findall(r"[A-Za-z_]\w+", span)}
    assert len(names) >= 8
    assert names - words == set()
