"""The bytes that whole columns take, counted: they keep to the budget, in groups of columns."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import dattri_core as dattri
from dattri_core import Task, run_plan

N, M, DIM = 20_000, 40, 16
BUDGET = 6 * 2**20


def peak_of(work):
    """Return the most bytes of tensors that were alive at once, beside those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DIM, generator=generator), torch.arange(count) % 10


def work(name, folder):
    task = Task(torch.nn.Linear(DIM, 10))
    method = dattri.method(name, inputs=True)
    return lambda: method.attribute(
        task, data(N, 1), data(M, 2), memory=BUDGET, out=folder, progress=False
    )


@pytest.mark.parametrize(
    "name",
    ["knn-shapley", "knn-shapley-regression", "knn-shapley-soft-label", "knn-shapley-threshold"],
)
def test_columns_keep_to_the_budget(name, tmp_path):
    assert peak_of(work(name, tmp_path / "scores")) <= BUDGET


def test_columns_that_are_not_planned_do_not(tmp_path, monkeypatch):
    original = run_plan.make_plan
    monkeypatch.setattr(
        run_plan,
        "make_plan",
        lambda budget, costs, work, **more: original(
            budget, costs, attrs.evolve(work, column=False), **more
        ),
    )
    assert peak_of(work("knn-shapley", tmp_path / "scores")) > BUDGET
