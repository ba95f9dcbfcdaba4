from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dattri_core as dattri
from dattri_core.registry import Registry, using

CELL = {
    "world": {"setting": "digits", "seed": 3},
    "method": {"name": "if-ekfac"},
    "metric": {"name": "lds"},
}


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what reads the scalars and texts that were written."""
    pytest.importorskip(
        "tensorboard", reason="tensorboard is not installed: pip install tensorboard"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("DATTRI_TENSORBOARD", str(tmp_path))

    def read() -> Any:
        found = EventAccumulator(str(tmp_path))
        found.Reload()
        return found

    return read


def attribute() -> None:
    torch.manual_seed(0)
    data = torch.randn(6, 3), torch.arange(6) % 2
    dattri.attribute(dattri.Task(nn.Linear(3, 2)), data, data, method="if-ekfac", progress=False)


def test_runs_and_cells_are_written_as_they_end(events: Any) -> None:
    registry = Registry.discovered()
    assert "dattri_tensorboard" in {p.origin.plugin for p in registry.plugins}
    with using(registry):
        attribute()
        attribute()
        registry.emit(
            "cell_finished", {"cell": CELL, "row": {"value": 0.4, "low": 0.3}, "seconds": 1.0}
        )
        registry.emit("cell_finished", {"cell": CELL, "row": {"error": "no"}, "seconds": 0.0})
    found = events()
    tags = set(found.Tags()["scalars"])
    assert {"run/ekfac-spectral-dot/seconds", "run/ekfac-spectral-dot/pairs_per_second"} <= tags
    seconds = found.Scalars("run/ekfac-spectral-dot/seconds")
    assert [point.step for point in seconds] == [0, 1]
    assert all(point.value > 0 for point in seconds)
    (value,) = found.Scalars("digits/lds/if-ekfac/value")
    assert (value.step, round(value.value, 6)) == (3, 0.4)
    texts = found.Tags()["tensors"]
    assert any("lds/if-ekfac/error" in tag for tag in texts)
    assert any("provenance" in tag for tag in texts)


def test_nothing_is_imported_or_written_unless_a_folder_is_named(tmp_path: Path) -> None:
    code = (
        "import sys, dattri_tensorboard.plugin as plugin\n"
        "plugin.cell_finished({}); plugin.run_finished({})\n"
        "heavy = {'torch', 'tensorboard', 'dattri_tensorboard.writer'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
