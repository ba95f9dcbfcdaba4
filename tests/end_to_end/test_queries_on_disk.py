"""Queries that wait on disk: one pass over the train set within the memory, and the same scores."""

import attrs
import numpy as np
import pytest
import torch
from oracles.routes import SMALL, taking
from torch import nn

import dattri_core as dattri
from dattri_core import Task, runner
from dattri_core import run_plan as engine
from dattri_core.laws.law import NotApplicable
from dattri_core.laws.pretended import accelerator

LENGTH, WIDTH, CLASSES = 24, 96, 5


def sequences(count, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, LENGTH, WIDTH, generator=generator)
    return inputs, torch.randint(CLASSES, (count,), generator=generator)


class Mean(nn.Module):
    """Every layer at every position, then their mean."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x).mean(1)


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    return Task(Mean())


TRAIN, TEST = sequences(200, 1), sequences(300, 2)
METHOD = dattri.method("if-ekfac")


def close(left, right):
    left, right = (np.asarray(scores.values) for scores in (left, right))
    return np.abs(left - right).max() <= 1e-4 * np.abs(right).max()


def plan_of(task, memory, out=None, test=TEST, train=TRAIN):
    return METHOD.attribute(task, train, test, memory=memory, out=out, dry_run=True)


def test_one_group_on_disk_where_memory_would_take_several(task, tmp_path):
    out = tmp_path / "scores"
    kept, away = plan_of(task, "16MiB"), plan_of(task, "16MiB", out)
    assert kept.groups > 10
    assert kept.route.offloaded is None
    assert away.groups == 1
    assert away.route.offloaded == "disk"
    assert "kept on disk" in str(away)
    assert sum(away.bytes[name] for name in ("query work", "train batch")) < away.budget
    written = METHOD.attribute(task, TRAIN, TEST, memory="16MiB", out=out)
    assert close(written, METHOD.attribute(task, TRAIN, TEST, memory="1GiB"))
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_a_run_that_was_stopped_goes_on_though_the_disk_has_become_small(
    task, tmp_path, monkeypatch
):
    """Its layout is that of its first plan, slabs included, so that not a bit differs."""
    out = tmp_path / "scores"
    want = METHOD.attribute(task, TRAIN, TEST, memory="16MiB", out=tmp_path / "whole")
    original, calls, plans = runner.Runner._report, [], []

    def stopped(self, *arguments):
        original(self, *arguments)
        plans.append(self.run.plan)
        if len(plans) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.Runner, "_report", stopped)
    with pytest.raises(KeyboardInterrupt):
        METHOD.attribute(task, TRAIN, TEST, memory="16MiB", out=out)
    assert [p.name for p in (tmp_path / "scores.run").iterdir()] == ["run.json"]

    def small(path):
        calls.append(path)
        return 0

    made = engine.make_plan

    def other(*arguments, **named):
        return attrs.evolve(made(*arguments, **named), slab=0)

    monkeypatch.setattr(engine, "free_on_disk", small)
    monkeypatch.setattr(engine, "make_plan", other)
    got = METHOD.attribute(task, TRAIN, TEST, memory="16MiB", out=out)
    assert calls
    before, after = plans
    assert before.route.offloaded == "disk"
    assert (after.route, after.slab, after.groups) == (before.route, before.slab, before.groups)
    assert np.array_equal(got.values, want.values)


@pytest.mark.parametrize("scorer", ["dot", "cosine", "relatif"])
def test_every_scorer_and_sweeps_read_them(task, scorer):
    """A length is read of every query, and every damping reads them again."""
    method = dattri.method("if-ekfac", scorer=scorer)
    train, test = sequences(9, 3), sequences(5, 4)
    fitted = method.fit(task, train, progress=False)
    want = fitted.attribute(test)
    swept = fitted.sweep(test, damping=[0.1, 1.0])
    costs = plan_of(task, "1GiB", test=test, train=train)
    assert costs.route.offloaded is None
    found = 0
    for choice in range(1, 40):
        with taking(choice, 1, **SMALL) as taken:
            got = method.fit(task, train, progress=False).attribute(test)
            if not taken:
                break
            if taken[0].offloaded == "disk":
                found += 1
                assert close(got, want)
    assert found >= 2
    for choice in range(1, 40):
        with taking(choice, 1, **SMALL) as taken:
            again = method.fit(task, train, progress=False).sweep(test, damping=[0.1, 1.0])
            if not taken:
                break
            if taken[0].offloaded == "disk":
                assert all(close(again[d], swept[d]) for d in swept)


def test_queries_of_a_device_wait_on_its_host(task, tmp_path):
    """The disk is for a processor: what a device cannot hold, its host does."""
    try:
        device = accelerator()
    except NotApplicable as reason:
        pytest.skip(str(reason))
    there = Task(Mean().to(device))
    assert plan_of(there, "16MiB", tmp_path / "scores").route.offloaded in (None, "host")
