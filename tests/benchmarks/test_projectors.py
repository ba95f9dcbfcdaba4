"""Flat projectors on the CPU against copying the rows, and against other count-sketches.

Goals: the block count-sketch takes at most 1.5 times a copy of the rows, with one thread and with
two, at most half the time of a sparse product in scipy, and a fifth of torch's `scatter_add_`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import floors
import numpy as np
import pytest
import scipy.sparse
import torch
from table import Table, Theme, seconds
from torch import Tensor

import dattri_core as dattri

pytestmark = pytest.mark.timeout(0)
THEME = Theme(
    "projectors",
    "Sketches of flat rows on the CPU",
    "32 rows of 10,000,000 numbers in float32, sketched to K = 2048. The copy is "
    "`destination.copy_(rows)`; the sparse product is `rows @ P` with P in CSR of one sign a row; "
    "the scattered sum is `scatter_add_` of signed rows. The times of the last two are without the "
    "making of their tables, that of ours with the drawing of all random numbers. Best of five. "
    "With two threads the start of the second one for each block of all rows, and the drawing of "
    "signs, take a part of both cores: the sketch gains a factor of 1.5 from the second one, and "
    "scatter_add_ of 2.",
)
BATCH, SIZE, DIM = 32, 10_000_000, 2048
SMALL = 200_000
"""Numbers of a row for sketches that take longer."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows_of(size: int) -> dattri.Rows:
    """Return random rows of one block."""
    space = dattri.Space((dattri.BlockSpec("flat", "dense", (size,)),))
    values = torch.randn(BATCH, size, generator=torch.Generator().manual_seed(0))
    return dattri.Rows(space, {"flat": dattri.DenseBlock(values)}, torch.arange(BATCH))


def sketch(rows: dattri.Rows, name: str, **fields: Any) -> Callable[[], Any]:
    """Return what maps the rows."""
    part = dattri.default_registry().make("projector", name, dim=DIM, **fields)
    stream = dattri.RandomStream(0, "projector")
    built = part.build(rows.space, stream=stream, device=torch.device("cpu"))
    return lambda: built.map(rows)


def copied(values: Tensor) -> Callable[[], Any]:
    """Return what copies the rows once."""
    destination = torch.empty_like(values)
    return lambda: destination.copy_(values)


def sparse_product(values: Tensor) -> Callable[[], Any]:
    """Return what multiplies the rows with a count-sketch in CSR."""
    size, generator = values.shape[1], np.random.default_rng(0)
    signs = generator.choice(np.array([-1, 1], dtype=np.float32), size)
    targets = generator.integers(0, DIM, size, dtype=np.int32)
    pointers = np.arange(size + 1, dtype=np.int32)
    matrix = scipy.sparse.csr_matrix((signs, targets, pointers), shape=(size, DIM))
    rows = values.numpy()
    return lambda: rows @ matrix


def scattered_sum(values: Tensor) -> Callable[[], Any]:
    """Return what adds signed rows to places of a table."""
    generator, size = torch.Generator().manual_seed(0), values.shape[1]
    targets = torch.randint(DIM, (size,), generator=generator).expand(BATCH, size)
    signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
    return lambda: torch.zeros(BATCH, DIM).scatter_add_(1, targets, values * signs)


@pytest.mark.parametrize("count", [1, 2])
def test_block_count_sketch(benchmark: Any, table: Table, registered: Any, count: int) -> None:
    """Against a copy, a sparse product and a scattered sum, all in one run."""
    registered("projector", "block-count-sketch")
    rows = rows_of(SIZE)
    values = rows.blocks["flat"].flat()
    with threads(count):
        work = sketch(rows, "block-count-sketch")
        own = benchmark.pedantic(floors.best_of, (work, 5), rounds=1)
        copy = floors.best_of(copied(values), 5)
        others = {
            "scipy's sparse product": (floors.best_of(sparse_product(values)), 2.0),
            "scatter_add_": (floors.best_of(scattered_sum(values)), 5.0),
        }
    what = f"block-count-sketch, {count} thread{'s' * (count > 1)}"
    _put(table, f"{what}, against a copy", own, copy, own / copy, "<= 1.5", own / copy <= 1.5)
    for name, (time, goal) in others.items():
        met = time / own >= goal
        _put(table, f"{what}, against {name}", own, time, time / own, f">= {goal:g} faster", met)
    benchmark.extra_info.update(copy=own / copy, **{n: t / own for n, (t, _) in others.items()})


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("block-count-sketch", {"nonzeros": 4}),
        ("srht", {}),
        ("rademacher", {}),
        ("gaussian", {}),
    ],
)
def test_slower_sketches(
    benchmark: Any, table: Table, registered: Any, name: str, fields: dict[str, Any]
) -> None:
    """What their thinner tails cost, on shorter rows; no goal."""
    registered("projector", name)
    rows = rows_of(SMALL)
    with threads(1):
        own = benchmark.pedantic(floors.best_of, (sketch(rows, name, **fields),), rounds=1)
        copy = floors.best_of(copied(rows.blocks["flat"].flat()), 5)
    spelled = ", ".join([name, *(f"{key}={value}" for key, value in fields.items())])
    what = f"{spelled}, rows of {SMALL:,}, 1 thread, against a copy"
    _put(table, what, own, copy, own / copy, "", "")


def _put(
    table: Table, what: str, own: float, other: float, ratio: float, goal: str, met: object
) -> None:
    cells = {"sketch": seconds(own), "against": seconds(other), "ratio": f"{ratio:.2f}"}
    table.put(what, **cells, goal=goal, met=met)
