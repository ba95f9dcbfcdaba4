"""Self-influence in ``dattri bench``: kept once, and solved for where a metric asks for it."""

import numpy as np
import pytest
import toy_bench
from bench_runs import bench, results, row_of
from toy_bench import ToySetting

import dattri_core as dattri
from dattri_core.registry import using

CG = "if-cg:curvature=ggn:tolerance=1e-6"


@pytest.fixture(scope="module", autouse=True)
def registry():
    with using(toy_bench.registry()) as made:
        entry = toy_bench.INSTALLED.entry("metric", "mislabel-auroc")
        made.part("metric", entry.name, entry.target, entry.summary)
        yield made


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """Figures take longer than all the rest, and have tests of their own."""
    monkeypatch.setattr("dattri_bench.command.draw", lambda rows, title, path: [])


def test_self_influence_is_kept_for_further_metrics(tmp_path):
    bench(tmp_path, "--methods", "grad-dot", "--metrics", "own")
    value = row_of(tmp_path, "grad-dot", "own")["value"]
    (path,) = (tmp_path / "self-influence").iterdir()
    assert np.isclose(np.load(path).sum(), value)
    for cell in (tmp_path / "cells").iterdir():
        cell.unlink()
    np.save(path, 2 * np.load(path))
    bench(tmp_path, "--methods", "grad-dot", "--metrics", "own")
    assert np.isclose(row_of(tmp_path, "grad-dot", "own")["value"], 2 * value)


def test_an_iterative_solver_is_asked_where_nothing_may_stand_in(tmp_path):
    """Without: minus the mean score. With: the diagonal of G (H + damping I)^-1 G^T."""
    metrics = ("mislabel-auroc", "mislabel-auroc:by=scores", "mislabel-auroc:by=self-influence")
    orders = (metrics, metrics[::-1])
    found = []
    for at, order in enumerate(orders):
        folder = tmp_path / str(at)
        bench(folder, "--methods", CG, "--metrics", *order, "own")
        rows = {row["metric"]: row for row in results(folder)["rows"]}
        assert all(row["error"] is None for row in rows.values())
        found.append({name: row["value"] for name, row in rows.items()})
        for name, row in rows.items():
            if name.endswith("(by=scores)"):
                continue  # says what the record of the scores holds by then
            told = any("no self-influence" in note for note in row["notes"])
            assert told == (name == "mislabel-auroc"), name
    assert found[0] == found[1]
    by = found[0]
    assert by["mislabel-auroc"] == by["mislabel-auroc (by=scores)"]
    assert by["mislabel-auroc"] != by["mislabel-auroc (by=self-influence)"]
    world = ToySetting().load((24, 8), seed=0, wrong=0.0)
    with using(toy_bench.INSTALLED):
        exact = dattri.method("if-explicit", curvature="ggn", damping=world.damping)
    square = exact.attribute(world.task, world.train, world.train).values
    assert np.isclose(by["own"], float(square.diagonal().double().sum()), rtol=1e-4)
