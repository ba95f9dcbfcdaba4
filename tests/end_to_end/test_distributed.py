"""Several processes of `torch.distributed` that share a run: what one process computes alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import shared_work
import torch

import dattri_core as dattri
from dattri_core import InputError, tiles

SIZE = 3
RANKS = range(SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return where the processes write."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder):
    """Return what each of three processes found."""
    (folder / "shared").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = Path(shared_work.__file__)
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(SIZE), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in RANKS
    ]
    for process in started:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in RANKS]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return what one process finds."""
    return {
        "methods": shared_work.of_methods(),
        "requests": shared_work.of_requests(tmp_path_factory.mktemp("alone")),
        "counted": shared_work.counted(),
    }


@pytest.mark.parametrize("what", ["methods", "requests"])
def test_every_process_has_what_one_has_alone(found, alone, what):
    for rank in RANKS:
        assert found[rank][what].keys() == alone[what].keys()
        for name, want in alone[what].items():
            if name.startswith("seen"):
                continue
            got = found[rank][what][name]
            assert got.dtype == want.dtype, name
            assert got.shape == want.shape, name
            gap = float((got - want).abs().max())
            assert gap <= 1e-9 * float(want.abs().max()), f"{name}: {gap}"


def test_all_processes_have_the_same_bits_of_scores_that_are_sent(found):
    for name, values in found[0]["methods"].items():
        if name.endswith("scores") and not name.startswith(("knn", "rps")):
            assert all(torch.equal(found[rank]["methods"][name], values) for rank in RANKS), name


@pytest.mark.parametrize("name", shared_work.COUNTED)
def test_each_evaluates_its_part(found, alone, name):
    whole = int(alone["counted"][name])
    for rank in RANKS:
        part = int(found[rank]["counted"][name])
        assert whole / SIZE <= part <= whole / SIZE + 100, (whole, part)


def test_what_is_fitted_once_is_read_by_all(found):
    for rank in RANKS:
        requests = found[rank]["requests"]
        saved = requests["seen for fits first"] - requests["seen for fits again"]
        assert int(saved) >= 2 * (shared_work.TRAIN // SIZE)
        assert torch.equal(requests["fits first"], requests["fits again"])
        assert torch.equal(requests["store first"], requests["store again"])


@pytest.mark.parametrize("name", ["grad-dot", "if-ekfac", "trak"])
def test_all_hear_of_a_failure_in_one(found, name):
    said = [found[rank]["failures"][name] for rank in RANKS]
    assert "not finite" in said[2]
    assert not said[2].startswith("ProcessError")
    for other in said[:2]:
        assert other == f"ProcessError: process 2 of 3 failed: {said[2]}"


def test_what_all_refuse_is_said_by_each_and_the_next_call_is_answered(found, alone):
    for rank in RANKS:
        failures = found[rank]["failures"]
        assert failures["spec"].startswith("SpecError: ")
        torch.testing.assert_close(failures["after"], alone["methods"]["grad-dot scores"])


@pytest.mark.parametrize("name", ["if-ekfac", "knn-shapley"])
def test_scores_on_disk_are_those_in_memory_and_are_found_again(found, alone, name):
    for rank in RANKS:
        on_disk = found[rank]["on disk"]
        torch.testing.assert_close(on_disk[f"{name} first"], alone["methods"][f"{name} scores"])
        assert torch.equal(on_disk[f"{name} again"], on_disk[f"{name} first"])


def test_a_run_on_disk_that_stopped_in_one_process_goes_on_in_all(found, tmp_path):
    told = [found[rank]["on disk"] for rank in RANKS]
    assert told[1]["stopped"] == "InputError: the disk is gone"
    failed = "ProcessError: process 1 of 3 failed: InputError: the disk is gone"
    assert told[0]["stopped"] == told[2]["stopped"] == failed
    assert int(told[0]["tiles before"]) == 4
    assert int(told[1]["tiles before"]) == 2
    counts = [int(one["tiles before"]) + int(one["tiles after"]) for one in told]
    assert counts == [4, 4, 4]
    for one in told:
        assert torch.equal(one["resumed"], told[0]["resumed"])


def test_one_process_goes_on_with_a_run_of_three(found, folder, monkeypatch):
    (folder / "left.run").rename(folder / "alone.run")
    done = []
    put = tiles.FolderTiles.put
    monkeypatch.setattr(
        tiles.FolderTiles, "put", lambda self, *given: done.append(given) or put(self, *given)
    )
    task, train = shared_work.task(shared_work.network()), shared_work.drawn(shared_work.TRAIN, 1)
    method, test = dattri.method("if-kfac"), shared_work.drawn(shared_work.TEST, 2)
    scores = method.attribute(task, train, test, out=folder / "alone")
    assert len(done) == 2
    want = found[0]["on disk"]["resumed"]
    torch.testing.assert_close(shared_work.copied(scores), want, rtol=1e-9, atol=0)


def test_a_part_of_the_processes_works_without_the_others(found, alone):
    for rank in (0, 1):
        got = found[rank]["failures"]["pair"]
        torch.testing.assert_close(got, alone["methods"]["if-diagonal scores"])
    assert found[2]["failures"]["pair"].startswith("InputError: distributed: this process is not")


def test_a_script_without_a_process_group_is_told_how_to_make_one():
    with pytest.raises(InputError, match="init_process_group"), dattri.distributed():
        pass
