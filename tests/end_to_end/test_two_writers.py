"""Two processes on one folder: no example counts twice, and no row is computed twice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from oracles.toy_tasks import examples, mlp, states

import dattri_core as dattri
from dattri_core import StoreError, Task, loop
from dattri_core import run_plan as engine
from dattri_core.tiles import FolderTiles

HERE = Path(__file__).parent
TRAIN, TEST = examples(60), examples(3, seed=300)


def started(kind, folder, saved):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(HERE / "two_writers.py"), kind, str(folder), str(saved)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def in_memory():
    task = Task(mlp(), checkpoints=states(2))
    return dattri.attribute(task, TRAIN, TEST, method="grad-dot").values.numpy()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no such signal")
def test_a_second_process_on_the_same_scores_is_refused_and_the_first_is_right(tmp_path):
    first = started("scores", tmp_path / "scores", tmp_path / "first.npy")
    assert first.stdout.readline() == "begun\n"
    first.send_signal(signal.SIGSTOP)  # it is at work for as long as the second needs
    second = started("scores", tmp_path / "scores", tmp_path / "second.npy")
    _, said = second.communicate(timeout=120)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert f"process {first.pid} on " in said.splitlines()[-1]
    out, said = first.communicate(timeout=120)
    assert first.returncode == 0, said
    assert int(out) == 20
    for values in (np.load(tmp_path / "first.npy"), dattri.Scores.load(tmp_path / "scores").values):
        np.testing.assert_allclose(values, in_memory(), rtol=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.npy", "scores"]


def test_two_processes_that_build_one_store_take_turns(tmp_path):
    made = [started("store", tmp_path / "rows", tmp_path / f"{at}.npy") for at in range(2)]
    counts = []
    for at, process in enumerate(made):
        out, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        counts.append(int(out.splitlines()[-1]))
        np.testing.assert_allclose(np.load(tmp_path / f"{at}.npy"), in_memory(), rtol=1e-12)
    assert sum(counts) == 20  # 10 shards at each of 2 checkpoints, once


def test_a_tile_that_another_process_filled_meanwhile_is_not_folded_again(tmp_path, monkeypatch):
    """Where a file system has no locks, the tile itself tells."""
    plan = engine.make_plan
    monkeypatch.setattr(
        engine, "make_plan", lambda *a, **k: attrs.evolve(plan(*a, **k), shard=30, train_batch=30)
    )
    original, run = loop.score_tile, tmp_path / "scores.run"

    def other_is_faster(*arguments):
        scored = original(*arguments)
        FolderTiles(run).put(0, 30, 2, {"0.sum": torch.ones(30, 3, dtype=torch.float64)})
        return scored

    monkeypatch.setattr(loop, "score_tile", other_is_faster)
    with pytest.raises(StoreError, match=r"rows from 30 on.*held 0 .*now holds 2: another process"):
        task = Task(mlp(), checkpoints=states(2))
        dattri.attribute(task, TRAIN, TEST, method="grad-dot", out=tmp_path / "scores")
