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
from dattri_core import InputError

SIZE = 3
RANKS = range(SIZE)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what each of three processes found."""
    folder = tmp_path_factory.mktemp("processes")
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
        assert failures["out"].startswith("SpecError: attribute(out=...): 3 processes share")
        assert failures["spec"].startswith("SpecError: ")
        torch.testing.assert_close(failures["after"], alone["methods"]["grad-dot scores"])


def test_a_part_of_the_processes_works_without_the_others(found, alone):
    for rank in (0, 1):
        got = found[rank]["failures"]["pair"]
        torch.testing.assert_close(got, alone["methods"]["if-diagonal scores"])
    assert found[2]["failures"]["pair"].startswith("InputError: distributed: this process is not")


def test_a_script_without_a_process_group_is_told_how_to_make_one():
    with pytest.raises(InputError, match="init_process_group"), dattri.distributed():
        pass
