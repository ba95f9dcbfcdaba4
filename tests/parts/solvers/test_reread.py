"""Woodbury's identity with rows that are read again, against dense solves in float64."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from attrs import define
from dattri_parts.curvatures.fisher_information import Fisher
from dattri_parts.curvatures.gauss_newton import GaussNewton
from dattri_parts.curvatures.ggn import GGN
from dattri_parts.solvers import woodbury
from dattri_parts.solvers.forecast import Forecast
from dattri_parts.solvers.woodbury import Woodbury
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.networks import (
    dense_ggn,
    dense_second_moment,
    diagonal_blocks,
    network,
    problem_of,
    solved,
)
from torch import nn

import dattri_core as dattri
from dattri_core import Damping, MemoryBudgetError, NumericsError, Outlook, Rows
from dattri_core.testing import PeakMemory

CPU = torch.device("cpu")


def queries(name, count=5, seed=9):
    """Return factored rows that are no train rows."""
    return Rows.concatenate(list(problem_of(*network(name, count, seed)).rows()))


def gap(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@define(slots=False)
class Counting:
    """An operator of little memory, which counts the rows that it gives."""

    operator: object
    memory: int = 2**28
    given: int = 0

    def __attrs_post_init__(self):
        for name in ("space", "dtype", "weight", "blockwise", "n_train", "apply"):
            setattr(self, name, getattr(self.operator, name))

    @staticmethod
    def of(operator, tile):
        """Return an operator that has room for the rows of so many examples."""
        forecast = Forecast.of(operator)
        room = (tile + 0.5) * forecast.example_bytes
        return Counting(operator, math.ceil(forecast.matrix_bytes + room))

    def rows(self):
        yield from self._counted(self.operator.rows())

    def rows_of(self, index):
        yield from self._counted(self.operator.rows_of(index))

    def _counted(self, read):
        for rows in read:
            self.given += len(rows)
            yield rows


def reread(curvature, name, n, tile=3, batch=3, damping=0.01, memory=None):
    """Return the inverse of a curvature whose rows do not fit, or not the given memory."""
    operator = Counting.of(curvature.fit(problem_of(*network(name, n), batch=batch)), tile)
    if memory is not None:
        operator.memory = memory
    return Woodbury(damping).solve_for(operator, CPU), operator


@pytest.mark.parametrize("tile", [1, 3])
@pytest.mark.parametrize("name", ["images", "reader"])
def test_equals_a_dense_solve_of_the_named_curvature(name, tile):
    n = 14
    task, train = network(name, n)
    problem = problem_of(task, train)
    rows = queries(name)
    moment = dense_second_moment(task, problem.space, train)
    cases = [
        (GGN(), dense_ggn(task, problem.space, train)),
        (GaussNewton(), moment),
        (Fisher(kind="empirical"), moment),
        (Fisher(draws=2), Fisher(draws=2).fit(problem).dense()),
    ]
    for curvature, matrix in cases:
        inverse, _ = reread(curvature, name, n, tile)
        answer = inverse.apply(rows)
        want = solved(matrix, 0.01, rows.flat())
        assert inverse.stats["rows_held"] == 0, curvature
        assert inverse.stats["tiles"] == math.ceil(n / tile), curvature
        assert gap(answer.flat(), want) < 1e-8, curvature
        assert torch.equal(answer.index, rows.index)
        assert (inverse.forms, inverse.base, inverse.blockwise) == (True, 0, False)
        assert inverse.beside == 2
        m = inverse.stats["rows"]
        assert inverse.held == 16 * m * m  # a Gram matrix and its factor


@pytest.mark.parametrize(("name", "n"), [("images", 8), ("reader", 8), ("images", 90)])
def test_blocks_that_are_inverted_apart_equal_a_dense_solve_of_each(name, n):
    task, train = network(name, n)
    space = problem_of(task, train).space
    rows = queries(name)
    matrix = diagonal_blocks(dense_second_moment(task, space, train), space)
    curvature = GaussNewton(block=True)
    operator = curvature.fit(problem_of(task, train))
    forecast = Forecast.of(operator)
    small = sum(group.primal(n) for group in forecast.groups)
    assert small == (n == 90)  # the convolution by its second moment
    counted = Counting(operator, math.ceil(forecast.matrix_bytes + 2 * forecast.example_bytes))
    inverse = Woodbury(0.01).solve_for(counted, CPU)
    assert inverse.stats["rows_held"] == 0
    assert inverse.stats["dual_blocks"] == len(space) - small
    assert gap(inverse.apply(rows).flat(), solved(matrix, 0.01, rows.flat())) < 1e-8
    again = inverse.with_damping(Damping(0.7)).apply(rows).flat()
    assert gap(again, solved(matrix, 0.7, rows.flat())) < 1e-8


@settings(max_examples=12, deadline=None)
@given(
    curvature=st.sampled_from([GGN(), GaussNewton(), Fisher(draws=2), GaussNewton(block=True)]),
    share=st.floats(0, 1),
    batch=st.sampled_from([1, 3, 64]),
)
def test_neither_the_memory_nor_batches_show(curvature, share, batch):
    """Any memory between the least and what holds all rows gives the same answers."""
    n, rows = 12, queries("images")
    want = Woodbury(0.05).solve_for(curvature.fit(problem_of(*network("images", n))), CPU)
    operator = curvature.fit(problem_of(*network("images", n), batch=batch))
    forecast = Forecast.of(operator)
    least = forecast.matrix_bytes + forecast.example_bytes
    memory = math.ceil(least + share * max(0, forecast.nbytes - least))
    inverse = Woodbury(0.05).solve_for(Counting(operator, memory), CPU)
    assert gap(inverse.apply(rows).flat(), want.apply(rows).flat()) < 1e-10


@pytest.mark.parametrize("curvature", [GaussNewton(), Fisher(draws=2)])
@pytest.mark.parametrize("tile", [1, 4, 7])
def test_rows_are_read_as_often_as_is_told(curvature, tile):
    n = 14
    operator = Counting.of(curvature.fit(problem_of(*network("images", n))), tile)
    m = n * (2 if curvature == Fisher(draws=2) else 1)
    forecast = Forecast.of(operator)
    operator.given = 0
    inverse = Woodbury(0.1).solve_for(operator, CPU)
    few = m // n * 8  # the forecast's
    tiles = math.ceil(n / tile)
    assert forecast.readings == (tiles + 1) / 2
    even = sum(n - start for start in range(0, n, forecast.tile)) / n
    assert operator.given == few + m * even
    assert even == pytest.approx(forecast.readings, abs=0.5)
    operator.given = 0
    answer = inverse.apply(queries("images")).flat()
    assert operator.given == 2 * m
    other = inverse.with_damping(Damping(0.5))
    assert operator.given == 2 * m  # none for another damping
    assert not torch.equal(other.apply(queries("images")).flat(), answer)


@settings(max_examples=10, deadline=None)
@given(
    dampings=st.lists(st.sampled_from([1e-3, 0.1, 3.0]), min_size=1, max_size=4),
    eigenvectors=st.booleans(),
)
def test_a_sweep_of_dampings_equals_fresh_solves(dampings, eigenvectors):
    task, train = network("images", 10)
    rows = queries("images")
    matrix = dense_second_moment(task, problem_of(task, train).space, train)
    small = woodbury.SMALL
    try:
        woodbury.SMALL = small if eigenvectors else 0
        operator = Counting.of(GaussNewton().fit(problem_of(task, train)), 4)
        operator.memory += 32 * 10**2 if eigenvectors else 0  # for eigenvectors
        first = Woodbury({"relative": 0.5}).solve_for(operator, CPU)
        before = first.apply(rows).flat()
        value = 0.5 * float(matrix.trace()) / len(matrix)
        assert first.stats["damping"] == pytest.approx(value, rel=1e-12)
        inverses = [first.with_damping(Damping(d)) for d in dampings]
        for damping, inverse in zip(dampings, inverses, strict=True):
            assert inverse.spectral == eigenvectors
            want = solved(matrix, damping, rows.flat())
            assert gap(inverse.apply(rows).flat(), want) < 1e-8
        assert gap(first.apply(rows).flat(), before) == 0
    finally:
        woodbury.SMALL = small


# --- rows that are not those that were foretold ---------------------------------------------------
@define(slots=False)
class Uneven(Counting):
    """The first examples have no row, or a few; those after them as many as they have."""

    first: int = 8
    least: int = 0

    def _counted(self, read):
        for rows in read:
            seen: dict[int, int] = {}
            kept = []
            for at, example in enumerate(rows.index.tolist()):
                seen[example] = seen.get(example, 0) + 1
                if example >= self.first or seen[example] <= self.least:
                    kept.append(at)
            self.given += len(kept)
            yield rows.take(torch.tensor(kept, dtype=torch.long))


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("share", [0.65, 0.85])
def test_more_rows_than_foretold_make_smaller_tiles(least, share):
    task, train = network("images", 20)
    problem = problem_of(task, train, batch=64)
    operator = Uneven(GGN().fit(problem), least=least)
    flat = torch.cat([rows.flat() for rows in operator.rows()])
    held = Woodbury(0.05).solve_for(operator, CPU)
    assert held.stats["rows_held"] == 1
    operator.memory = int(share * (held.stats["row_bytes"] + held.stats["factor_bytes"]))
    inverse = Woodbury(0.05).solve_for(operator, CPU)
    assert inverse.stats["rows_held"] == 0
    want = solved(flat.T @ flat / 20, 0.05, queries("images").flat())
    assert gap(inverse.apply(queries("images")).flat(), want) < 1e-8


def test_one_example_that_does_not_fit_is_refused_by_its_number():
    operator = Uneven(GGN().fit(problem_of(*network("images", 20), batch=64)), first=19)
    operator.memory = 1000
    with pytest.raises(
        MemoryBudgetError, match=r"rows of train example 19 take more than .*memory="
    ):
        Woodbury(0.05).solve_for(operator, CPU)


def test_rows_that_changed_or_are_not_finite_are_refused():
    operator = Uneven(GGN().fit(problem_of(*network("images", 12))), first=0)
    forecast = Forecast.of(operator)
    operator.memory = math.ceil(forecast.matrix_bytes + 3 * forecast.example_bytes)
    inverse = Woodbury(0.05).solve_for(operator, CPU)
    operator.first = 1
    with pytest.raises(NumericsError, match="22 rows of the curvature, 24 at the fit"):
        inverse.apply(queries("images"))
    task, train = network("images", 12)
    train[0][11] = float("inf")
    with pytest.raises(NumericsError, match="not finite"):
        Woodbury(0.05).solve_for(Counting.of(GaussNewton().fit(problem_of(task, train)), 3), CPU)


# --- rounding, memory and what is told ------------------------------------------------------------
def wide(n_train=60, n_test=4):
    """Return a convolutional network in float32 with 90 KB of rows an example."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2), nn.Tanh(), nn.Conv2d(32, 64, 3), nn.Tanh(), nn.Flatten(),
            nn.Linear(64 * 25, 2),
        )  # fmt: skip
    sets = []
    for n in (n_train, n_test):
        inputs = torch.randn(n, 3, 16, 16, generator=generator)
        sets.append((inputs, torch.randint(2, (n,), generator=generator)))
    return dattri.Task(model), *sets


@define(slots=False)
class Rounded(Counting):
    """Rows read by example differ by roundings of float32, as those of other batches do."""

    def rows_of(self, index):
        generator = torch.Generator().manual_seed(len(index))
        for rows in self._counted(self.operator.rows_of(index)):
            off = torch.randn(len(rows), generator=generator, dtype=torch.float64)
            yield rows.scale(1 + 3e-7 * off)


@pytest.mark.filterwarnings("ignore:solver 'woodbury'")
def test_what_the_rounding_of_float32_leaves_over_is_solved_for():
    """A damping far below the largest eigenvalue: nearly all of a row is subtracted from it."""
    task, train, test = wide(40)
    operator = GGN().fit(problem_of(task, train, batch=4))
    flat = torch.cat([rows.flat() for rows in operator.rows()]).double()
    queried = Rows.concatenate(list(problem_of(task, test).rows()))
    shifted = flat @ flat.T + 40 * 1e-4 * torch.eye(len(flat), dtype=torch.float64)
    solution = torch.linalg.solve(shifted, flat @ queried.flat().double().T)
    want = (queried.flat().double() - solution.T @ flat) / 1e-4
    inverse = Woodbury(1e-4).solve_for(Rounded(operator, Counting.of(operator, 9).memory), CPU)
    assert inverse.stats["rows_held"] == 0
    assert inverse.stats["rounding"] > 1e-3
    found = inverse.apply(queried).flat().double()
    assert gap(flat @ found.T, flat @ want.T) < 1e-3


def test_the_peak_stays_by_the_memory_that_rows_would_exceed():
    task, train, test = wide()
    held = Woodbury(0.1).solve_for(GGN().fit(problem_of(task, train, batch=4)), CPU)
    row_bytes = held.stats["row_bytes"]
    memory = int(row_bytes / 3)
    rows = Rows.concatenate(list(problem_of(task, test).rows()))
    with PeakMemory() as seen:
        operator = GGN().fit(problem_of(task, train, batch=4, memory=memory))
        inverse = Woodbury(0.1).solve_for(operator, CPU)
        fitted = seen.peak
        seen.reset()
        answer = inverse.apply(rows)
    assert inverse.stats["tiles"] == 4
    assert fitted < 1.6 * memory < row_bytes  # one tile, a batch, and what is formed to meet it
    # What is subtracted and what it gains in float64, a batch of as many rows, formed too.
    assert seen.peak < 8 * answer.nbytes
    assert gap(answer.flat(), held.apply(rows).flat()) < 1e-4


def test_the_forecast_tells_which_way_and_what_it_takes(caplog):
    operator = Counting.of(GGN().fit(problem_of(*network("images", 12))), 4)
    told = Woodbury(0.1).foresee(operator, Outlook(blockwise=True))
    assert (told.forms, told.base, told.blockwise, told.beside) == (True, 0, False, 2)
    assert "24 rows (" in told.note
    assert "read again: 2 times to fit, in 3 tiles of 4 examples, and 2 times for" in told.note
    assert "multiply-adds" in told.note
    with caplog.at_level(logging.INFO, "dattri"):
        Woodbury(0.1).solve_for(operator, CPU)
    assert "24 rows (" in caplog.text
    operator.memory = 2**28
    told = Woodbury(0.1).foresee(operator, Outlook())
    assert (told.forms, told.base) == (False, 24)
    held = Woodbury(0.1).solve_for(operator, CPU)
    assert told.held == pytest.approx(held.held, rel=0.1)
    assert "24 rows are held" in told.note
    operator.memory = 100
    with pytest.raises(MemoryBudgetError, match="give a larger memory="):
        Woodbury(0.1).foresee(operator, Outlook())
