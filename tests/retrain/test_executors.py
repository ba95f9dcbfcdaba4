"""Any executor, and a setting's retraining that goes to it as plain data."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import sys
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import attrs
import numpy as np
import pytest
from dattri_retrain import (
    CounterfactualStore,
    SettingRetraining,
    dask_executor,
    joblib_executor,
    submitit_executor,
)
from retrain_plans import same, subsets
from retrain_setting import LOADED, ToySetting
from toy_retraining import M, N, Toy

import dattri_core as dattri
from dattri_core import InputError, NumericsError, Retraining, SpecError, StoreError

PLAN = subsets(11)


@pytest.fixture
def want(tmp_path):
    store = CounterfactualStore(tmp_path / "reference", Toy())
    store.fill(PLAN)
    return store.rows()


class Here(Executor):
    """Runs a job when it is submitted; counts them, and pickles what an executor would."""

    def __init__(self):
        self.jobs = 0

    def submit(self, function, /, *args, **kwargs):
        self.jobs += 1
        future = Future()
        try:
            future.set_result(pickle.loads(pickle.dumps(function))(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


# --- executors ------------------------------------------------------------------------------------
@pytest.mark.parametrize("jobs", [1, 3, 64])
def test_an_executor_gives_the_rows_that_this_process_gives(tmp_path, want, jobs):
    executor = Here()
    store = CounterfactualStore(tmp_path, Toy(together=2))
    assert store.fill(PLAN, executor, jobs=jobs) == 11
    assert executor.jobs == min(jobs, 6)
    assert same(store.rows(), want)
    assert store.fill(PLAN, executor) == 0


def test_threads(tmp_path, want):
    store = CounterfactualStore(tmp_path, Toy())
    with ThreadPoolExecutor(3) as pool:
        store.fill(PLAN, pool)
    assert same(store.rows(), want)


def test_processes(tmp_path, want):
    store = CounterfactualStore(tmp_path, Toy(together=2))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        store.fill(PLAN[:6], pool, (1, 2))
        assert len(store) == 4
        store.fill(PLAN, pool)
    assert same(store.rows(), want)


def test_joblib(tmp_path, want):
    pytest.importorskip("joblib")
    store = CounterfactualStore(tmp_path, Toy())
    executor = joblib_executor(1)
    assert isinstance(executor, Executor)
    store.fill(PLAN, executor)
    assert same(store.rows(), want)
    executor.shutdown(wait=True)


def test_joblib_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib.externals.loky", None)
    with pytest.raises(SpecError, match=r"cannot import joblib.*pip install joblib"):
        joblib_executor()


class FakeClient:
    """As much of distributed.Client as the adapter uses."""

    def get_executor(self, pure):
        self.pure = pure
        return Here()


def test_dask(tmp_path, want):
    client = FakeClient()
    store = CounterfactualStore(tmp_path, Toy())
    store.fill(PLAN, dask_executor(client))
    assert same(store.rows(), want)
    assert client.pure is False
    with pytest.raises(SpecError, match=r"expected a distributed.Client"):
        dask_executor(3)


class FakeJob:
    """A submitit job that is done after some looks."""

    def __init__(self, function):
        self.function, self.looks = function, 0

    def done(self):
        self.looks += 1
        return self.looks > 2

    def result(self):
        return pickle.loads(pickle.dumps(self.function))()


class FakeSubmitit:
    def __init__(self):
        self.jobs = []

    def update_parameters(self, **parameters):
        pass

    def submit(self, function, *args, **kwargs):
        assert not args
        assert not kwargs
        self.jobs.append(FakeJob(function))
        return self.jobs[-1]


def test_submitit(tmp_path, want):
    slurm = FakeSubmitit()
    store = CounterfactualStore(tmp_path, Toy())
    store.fill(PLAN, submitit_executor(slurm, poll=0.001), jobs=4)
    assert same(store.rows(), want)
    assert [job.looks for job in slurm.jobs] == [3] * 4
    bad = CounterfactualStore(tmp_path, Toy(steps=4, diverges=PLAN[0].key))
    with pytest.raises(NumericsError, match="diverged"):
        bad.fill(PLAN, submitit_executor(slurm, poll=0.001))
    assert len(bad) == 10
    with pytest.raises(SpecError, match=r"expected a submitit.AutoExecutor"):
        submitit_executor(3)


# --- what goes wrong there ------------------------------------------------------------------------
def test_a_job_that_fails_is_raised_when_the_others_are_done(tmp_path):
    store = CounterfactualStore(tmp_path, Toy(diverges=PLAN[2].key))
    with pytest.raises(NumericsError, match="diverged"):
        store.fill(PLAN, Here())
    assert [c.key for c in store.missing(PLAN)] == [PLAN[2].key]


def test_ctrl_c_cancels_the_jobs_that_wait(tmp_path):
    started = threading.Event()

    @attrs.frozen(eq=False)
    class Slow(Toy):
        def train(self, counterfactuals):
            started.set()
            return super().train(counterfactuals)

    class Stopping(ThreadPoolExecutor):
        def submit(self, function, /, *args, **kwargs):
            future = super().submit(function, *args, **kwargs)
            if self.count == 5:
                started.wait(10)
                raise KeyboardInterrupt
            self.count += 1
            return future

    store = CounterfactualStore(tmp_path, Slow(pause=0.05))
    with Stopping(1) as pool:
        pool.count = 0
        with pytest.raises(KeyboardInterrupt):
            store.fill(PLAN, pool)
    assert 1 <= len(store) < 6


def test_a_retraining_that_cannot_leave_this_process_is_refused_at_once(tmp_path):
    @attrs.frozen(eq=False)
    class Local(Toy):
        pass

    store = CounterfactualStore(tmp_path, Local())
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
        pytest.raises(InputError, match=r"cannot go to another process.*SettingRetraining"),
    ):
        store.fill(PLAN, pool)


@attrs.frozen(eq=False)
class Elsewhere(Toy):
    """A retraining that is another one after it was sent."""

    sent: bool = False

    @property
    def fingerprint(self):
        return "there" if self.sent else "here"

    def __reduce__(self):
        return Elsewhere, (N, M, 1, 10, None, None, None, 0.0, [], True)


def test_a_worker_with_other_data_or_code_is_refused(tmp_path):
    store = CounterfactualStore(tmp_path, Elsewhere())
    with pytest.raises(InputError, match=r"where it runs the retraining is .*'there'"):
        store.fill(PLAN, Here())
    assert len(store) == 0


class Lost(Here):
    """Its jobs write where this machine cannot see it."""

    def submit(self, function, /, *args, **kwargs):
        elsewhere = attrs.evolve(function, folder=Path(f"{function.folder}-not-shared"))
        return super().submit(elsewhere, *args, **kwargs)


def test_a_folder_that_is_not_shared_is_named(tmp_path):
    with pytest.raises(StoreError, match="must be one that every machine sees"):
        CounterfactualStore(tmp_path, Toy()).fill(PLAN, Lost())


def test_jobs_must_be_some(tmp_path):
    with pytest.raises(InputError, match="jobs is 0"):
        CounterfactualStore(tmp_path, Toy()).fill(PLAN, Here(), jobs=0)


# --- a setting as plain data ----------------------------------------------------------------------
def test_a_setting_that_gives_its_retraining_trains_no_network(toy_setting, monkeypatch):
    asked = []

    def retraining(self, size, seed, wrong):
        asked.append((size, seed, wrong))
        return Toy()

    monkeypatch.setattr(ToySetting, "retraining", retraining, raising=False)
    made = SettingRetraining("toy", (N, M), seed=3, wrong=0.2)
    assert made.fingerprint == Toy().fingerprint
    assert (asked, LOADED) == ([((N, M), 3, 0.2)], [])


def test_a_setting_is_spelled_and_loaded_where_it_is_used(tmp_path, toy_setting):
    made = SettingRetraining("toy", (N, M), seed=3)
    assert LOADED == []
    text = pickle.dumps(made)
    assert len(text) < 300
    assert pickle.loads(text) == made
    assert isinstance(made, Retraining)
    toy = Toy(together=2)
    assert (made.fingerprint, made.n_train, made.n_test) == (toy.fingerprint, N, M)
    assert (dict(made.targets), made.together) == (toy.targets, 2)
    assert LOADED == [((N, M), 3, None)]
    store = CounterfactualStore(tmp_path, made)
    store.fill(PLAN, Here())
    assert np.array_equal(store.outcomes(PLAN, "loss"), toy.expected(PLAN, "loss"))
    assert len(LOADED) == 1


def test_a_setting_that_does_not_exist_is_named(tmp_path, toy_setting):
    with pytest.raises(SpecError, match="no setting 'tooy'; did you mean 'toy'"):
        CounterfactualStore(tmp_path, SettingRetraining("tooy"))


def test_a_ground_truth_may_be_spelled_as_plain_data_and_is_written_so(tmp_path, toy_setting):
    spelled = {
        "name": "retraining",
        "folder": str(tmp_path),
        "retraining": {"setting": "toy", "size": [8, 3]},
    }
    made = dattri.method("leave-one-out", ground_truth=spelled)
    assert isinstance(made.ground_truth, CounterfactualStore)
    assert made.ground_truth.retraining == SettingRetraining("toy", (8, 3))
    assert made.ground_truth.retraining.n_train == 8
    written = dattri.describe_part(made)
    assert written == {"name": "leave-one-out", "ground_truth": spelled}
    json.dumps(written)
    with pytest.raises(SpecError, match="did you mean 'size'"):
        CounterfactualStore(tmp_path, {"setting": "toy", "sizes": [8, 3]})
    with pytest.raises(SpecError, match="under 'setting'"):
        CounterfactualStore(tmp_path, {"size": [8, 3]})
    for wrong in ({"folder": "x"}, 3):
        with pytest.raises(SpecError, match=r"ground truth: got .* expected Outcomes"):
            dattri.method("leave-one-out", ground_truth=wrong)
    with pytest.raises(SpecError, match="no ground truth 'retrainin'"):
        dattri.method("leave-one-out", ground_truth={"name": "retrainin"})
