"""Of what is large one is alive at a time: a fitted checkpoint, the queries of a group."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from torch import nn

import dattri_core as dattri
from dattri_core import fitted as fitted_module
from dattri_core import loop


@contextmanager
def without_collection() -> Iterator[None]:
    """What waits for the collector of cycles counts as alive."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Watch:
    """Wraps a function whose results are to be gone when it is called again."""

    def __init__(self, function: Callable[..., Any], parts: Callable[[Any], list[Any]]) -> None:
        """Watch the parts of each result."""
        self.function, self.parts = function, parts
        self.made: list[Any] = []
        self.alive: list[int] = []

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call, and count what is left of earlier results."""
        self.alive.append(sum(one() is not None for one in self.made))
        found = self.function(*args, **options)
        self.made = [weakref.ref(part) for part in self.parts(found)]
        return found


def world(checkpoints: int) -> tuple[dattri.Task, Any, Any]:
    """Return a task with several checkpoints, and data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))
    states = [
        {name: value + 0.1 * k for name, value in model.state_dict().items()}
        for k in range(checkpoints)
    ]
    task = dattri.Task(model, checkpoints=states)
    data = [(torch.randn(n, 20), torch.randint(3, (n,))) for n in (24, 16)]
    return task, *data


RUNS: dict[str, Callable[[Any, Any, Path], Any]] = {
    "scores": lambda fitted, test, folder: fitted.attribute(test),
    "by checkpoint": lambda fitted, test, folder: fitted.attribute(test, by="checkpoint"),
    "on disk": lambda fitted, test, folder: fitted.attribute(test, out=folder / "scores"),
    "sweep": lambda fitted, test, folder: fitted.sweep(test, damping=[0.1, 1.0]),
    "extremes": lambda fitted, test, folder: fitted.extremes(test, 3),
    "self-influence": lambda fitted, test, folder: fitted.self_influence(),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("method", ["if-diagonal", "if-ekfac", "if-datainf", "relatif-ekfac"])
def test_a_checkpoint_is_gone_before_the_next_is_fitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: str, method: str
) -> None:
    """Its inverse Hessian, which may be as large as the model many times over, with it."""
    task, train, test = world(3)
    watch = Watch(fitted_module.fit_checkpoint, lambda made: [made, *made.chain.inverses])
    monkeypatch.setattr(fitted_module, "fit_checkpoint", watch)
    with without_collection():
        fitted = dattri.method(method, damping=0.1).fit(task, train)
        RUNS[run](fitted, test, tmp_path)
    assert len(watch.alive) >= 3
    assert watch.alive == [0] * len(watch.alive)


@pytest.mark.parametrize("run", [name for name in RUNS if name != "self-influence"])
@pytest.mark.parametrize("method", ["if-diagonal", "if-ekfac", "if-datainf", "relatif-ekfac"])
def test_queries_of_a_group_are_gone_before_those_of_the_next_are_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: str, method: str
) -> None:
    """A group is as large as half of the budget: two of them would be all of it."""
    task, train, test = world(2)
    watch = Watch(loop.make_branches, lambda made: [q for one in made for q in one.queries])
    monkeypatch.setattr(loop, "make_branches", watch)
    plan_run = fitted_module.plan_run

    def in_groups(*args: Any) -> Any:
        return attrs.evolve(plan_run(*args), query_group=5, groups=4)

    monkeypatch.setattr(fitted_module, "plan_run", in_groups)
    with without_collection():
        fitted = dattri.method(method, damping=0.1).fit(task, train)
        RUNS[run](fitted, test, tmp_path)
    assert len(watch.alive) == 8  # four groups at each of two checkpoints
    assert watch.alive == [0] * len(watch.alive)


@pytest.mark.parametrize("run", RUNS)
def test_what_a_fit_and_a_group_freed_is_given_back_before_queries_are_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: str
) -> None:
    """The budget is that of the process, and what the allocator keeps for later counts."""
    task, train, test = world(2)
    order: list[str] = []

    def told(word: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            found = function(*args, **options)
            order.append(word)
            return found

        return call

    monkeypatch.setattr(fitted_module, "fit_checkpoint", told("fit", fitted_module.fit_checkpoint))
    monkeypatch.setattr(loop, "give_back", told("give back", loop.give_back))
    monkeypatch.setattr(loop, "make_branches", told("make", loop.make_branches))
    fitted = dattri.method("if-ekfac", damping=0.1).fit(task, train)
    RUNS[run](fitted, test, tmp_path)
    each = ["fit", "give back", *([] if run == "self-influence" else ["make"])]
    assert order == each * 2
