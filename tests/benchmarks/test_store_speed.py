"""What writing rows or a fit adds to a pass, and what a second test set or fit costs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import own_run
import pytest
import worlds as saved
from making import MLP
from table import Theme, seconds

import dattri_core as dattri
from dattri_core import stored

pytestmark = pytest.mark.timeout(0)
THEME = Theme(
    "store",
    "The gradient store",
    "Rows in a block count-sketch of 2048 numbers. Write: a build of the store against the same "
    "build that keeps nothing, taken in turns, the shortest of five each. Second test set: "
    "`attribute` for as many other test examples, of the fitted method and of one that opens the "
    "store anew, against the first that computes the train rows. One that opens the store anew "
    "also makes the rows of a few train examples and looks at the data, which takes as long for "
    "any train set of a network. Kept fits: a fit with `fits=` at an empty folder, and one that "
    "finds its fit there, against one without; no goal was set.",
)
SKETCH = {"projector": {"name": "block-count-sketch", "dim": 2048}}
WORLDS: dict[str, tuple[Any, ...]] = {
    "MLP, MNIST 5000": ("mnist", MLP, 5000, 500),
    "ResNet-9, CIFAR-2 500": ("cifar2", 500, 50),
}
QUERIES = 5


def _method() -> Any:
    return dattri.Method(**SKETCH)


@pytest.mark.parametrize("name", WORLDS)
def test_store_write(
    benchmark: Any, worlds: Any, row: Any, tmp_path: Path, name: str, monkeypatch: Any
) -> None:
    """Time of a build with its files against one without."""
    world = saved.load(worlds(*WORLDS[name]))
    task = own_run.task_of(world)
    rounds = 5 if name.startswith("MLP") else 2
    kept = stored.StoredCheckpoint.write
    times: dict[bool, list[float]] = {True: [], False: []}
    fit = {True: kept, False: lambda *_: None}

    def build(writes: bool) -> None:
        monkeypatch.setattr(stored.StoredCheckpoint, "write", fit[writes])
        folder = tmp_path / f"{writes}-{len(times[writes])}"
        start = time.perf_counter()
        _method().fit(task, world.train, store=folder)
        times[writes].append(time.perf_counter() - start)

    def both() -> None:
        for writes in (False, True) * rounds:
            build(writes)

    benchmark.pedantic(both, rounds=1)
    with_files, without = min(times[True]), min(times[False])
    ratio = with_files / without
    row(f"write, {name}", seconds(with_files), seconds(without), ratio, "<= 1.1", ratio <= 1.1)


@pytest.mark.parametrize(
    ("n_train", "anew"),
    [(500, False), (500, True), (1000, True), (2000, True)],
    ids=["fitted", "anew", "more", "most"],
)
def test_store_second_test_set(
    benchmark: Any, worlds: Any, row: Any, tmp_path: Path, n_train: int, anew: bool
) -> None:
    """The first attribution, which computes the train rows, against a second one."""
    world = saved.load(worlds("cifar2", n_train, 50))
    task = own_run.task_of(world)
    first, second = (
        dattri.take(world.test, slice(start, start + QUERIES)) for start in (0, QUERIES)
    )
    start = time.perf_counter()
    fitted = _method().fit(task, world.train, store=tmp_path / "rows")
    fitted.attribute(first)
    once = time.perf_counter() - start

    def again() -> Any:
        if not anew:
            return fitted.attribute(second)
        return _method().attribute(task, world.train, second, store=tmp_path / "rows")

    benchmark.pedantic(again, rounds=3)
    took = float(benchmark.stats.stats.min)
    ratio = once / took
    way = "opened anew" if anew else "fitted"
    row(
        f"{QUERIES} queries again, ResNet-9 {n_train}, {way}",
        seconds(took),
        seconds(once),
        ratio,
        ">= 50",
        ratio >= 50,
    )


@pytest.mark.parametrize("name", WORLDS)
def test_store_of_fits(benchmark: Any, worlds: Any, table: Any, tmp_path: Path, name: str) -> None:
    """Time of a fit that is kept, and of one that is read, against one that is neither."""
    world = saved.load(worlds(*WORLDS[name]))
    task = own_run.task_of(world)
    method = dattri.method("if-ekfac")

    def timed(folder: Path | None) -> float:
        start = time.perf_counter()
        method.fit(task, world.train, fits=folder)
        return time.perf_counter() - start

    timed(None)  # the first one warms up
    plain = min(timed(None) for _ in range(2))
    kept = min(timed(tmp_path / f"fits-{at}") for at in range(2))
    benchmark.pedantic(lambda: timed(tmp_path / "fits-0"), rounds=3)
    read = float(benchmark.stats.stats.min)
    for what, took in (("kept", kept), ("read", read)):
        table.put(
            f"fit {what}, if-ekfac, {name}",
            measured=seconds(took),
            against=seconds(plain),
            ratio=took / plain if what == "kept" else plain / took,
            goal="",
            met="",
        )
