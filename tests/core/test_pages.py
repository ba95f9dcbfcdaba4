"""Pages: batches of large tensors are cut where the system would clear new memory each time."""

from itertools import pairwise

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.toy_tasks import normal
from torch import nn

import dattri_core as dattri
from dattri_core import Task, pages, snapshot
from dattri_core import pool as pools
from dattri_core.activations import (
    LEAST,
    activation_bytes,
    activation_sizes,
    tensors_made,
    total_bytes,
)
from dattri_core.assemble import build_part
from dattri_core.pages import (
    BATCH,
    PAGE_BYTE,
    REUSED,
    batch_sizes,
    batch_work,
    best_batch,
    fresh_bytes,
    reused_rows,
)
from dattri_core.plans import Costs, Route, Work, make_plan
from dattri_core.problem import collect
from dattri_core.protocols import BoundSource
from dattri_core.stream import Examples

MIB = 2**20
tensors = st.lists(st.integers(1, 64 * MIB), min_size=1, max_size=8)
count = st.integers(1, 5000)


def test_tensors_count_from_where_a_batch_of_them_is_larger_than_the_allocator_keeps():
    large, small = REUSED // 8, REUSED // 64
    fresh = [fresh_bytes([large, small], batch) for batch in (8, 9, 64, 65)]
    assert fresh == [0, large, large, large + small]


@given(tensors, count, count, st.integers(0, 10**8))
def test_batches_cover_all_within_the_memory_and_none_of_those_weighed_is_cheaper(
    sizes, total, most, each
):
    most = min(most, total)
    weighed = list(batch_sizes(sizes, total, most))
    counts = [-(-total // size) for size in (most, weighed[0])]
    assert counts[0] == counts[1]  # no more batches than the memory asks for
    assert counts[0] * (weighed[0] - 1) < total  # nor larger ones than so many need
    assert all(1 <= b <= a for a, b in pairwise(weighed))
    assert weighed[-1] == 1 or not fresh_bytes(sizes, weighed[-1])
    best = best_batch(sizes, total, most, each)
    work = [batch_work(sizes, total, size, each) for size in weighed]
    assert best in weighed
    assert batch_work(sizes, total, best, each) == min(work)


def test_the_work_of_batches_in_closed_form():
    """Ten examples of 20 and 1 MiB: fours of them take the larger anew, and come in three."""
    sizes = (20 * MIB, MIB)
    assert batch_work(sizes, 10, 4, 7) == 10 * 20 * MIB * PAGE_BYTE + 3 * (BATCH + 7)
    assert batch_work(sizes, 10, 1) == 10 * BATCH


def test_an_accelerator_keeps_all_memory_so_that_batches_are_as_large_as_they_fit():
    assert batch_work((), 10, 3, 7) == 0
    assert list(batch_sizes((), 10_000, 4000)) == [3334]
    assert best_batch((), 10_000, 4000) == 3334


# --- plans ----------------------------------------------------------------------------------------
ROUTE = Route(deferred=False, cut=1, train_row=MIB, test_row=MIB, kept=2**10)
LARGE = Costs(MIB, 10**6, (ROUTE,), tensors=(MIB, MIB))


def test_a_plan_cuts_batches_of_large_tensors_on_a_processor_alone():
    work = Work(n_train=600, n_test=600)
    plan = make_plan(2**34, LARGE, work)
    assert (plan.train_batch, plan.test_batch) == (19, 19)  # 600 / 32, of 1 MiB each
    whole = make_plan(2**34, attrs.evolve(LARGE, tensors=()), work)
    assert (whole.train_batch, whole.test_batch) == (600, 600)
    assert plan.bytes["train batch"] < whole.bytes["train batch"]


def test_batches_stay_large_where_each_would_read_queries_that_cost_more():
    """A million each for each of a thousand queries, beside train rows of a little memory."""
    queries = attrs.evolve(LARGE, routes=(attrs.evolve(ROUTE, kept=4 * MIB),))
    work = Work(n_train=600, n_test=1000)
    plan = make_plan(2**35, queries, work)
    assert plan.groups == 1
    assert plan.train_batch == 600
    few = make_plan(2**35, queries, attrs.evolve(work, n_test=10))
    assert few.train_batch == 19


def test_batches_stay_large_where_deferred_queries_are_formed_for_each():
    dear = attrs.evolve(ROUTE, deferred=True, expanded=1, each=10**8)
    work = Work(n_train=600, n_test=1000)
    assert make_plan(2**35, attrs.evolve(LARGE, routes=(dear,)), work).train_batch == 600
    cheap = attrs.evolve(LARGE, routes=(attrs.evolve(dear, each=1),))
    assert make_plan(2**35, cheap, work).train_batch == 19


# --- what an example makes ------------------------------------------------------------------------
WIDTH, LENGTH = 512, 2048


class Sequences(nn.Module):
    """A network on sequences, whose tensors are 4 MiB for each."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.second = nn.Linear(WIDTH, 4)

    def forward(self, x):
        return self.second(self.first(x).tanh()).mean(1)


def sequences(n, seed):
    return normal(n, LENGTH, 8, seed=seed).float(), torch.arange(n) % 4


@pytest.fixture
def bound() -> BoundSource:
    torch.manual_seed(0)
    task = Task(Sequences(), "cross-entropy")
    return build_part("source", "per-example").bind(task, task.checkpoints[0], sequences(3, 1))


def test_what_an_example_makes_is_what_a_pass_keeps_and_the_factors_of_its_row(bound):
    data = sequences(3, 1)
    sizes = activation_sizes(bound.evaluator, data)
    assert LENGTH * WIDTH * 4 in sizes  # of tanh
    assert activation_bytes(bound.evaluator, data) == total_bytes(sizes) == sum(sizes)
    rows = collect(bound, data, torch.arange(3), "train", torch.device("cpu"))
    made = tensors_made(rows, sizes)
    assert made[: len(sizes)] == sizes
    factors = sum(block.nbytes for block in rows.blocks.values()) // 3
    assert sum(made[len(sizes) :]) == factors


def test_rows_on_a_device_cut_no_batch(bound):
    data = sequences(3, 1)
    rows = collect(bound, data, torch.arange(3), "train", torch.device("cpu"))
    assert tensors_made(rows.to(torch.device("meta")), (1, 2)) == ()


def noted(monkeypatch):
    """Return a list to which every batch of a fit or a self-influence is added."""
    batches = []
    original = snapshot.best_batch

    def note(*arguments):
        batches.append(original(*arguments))
        return batches[-1]

    monkeypatch.setattr(snapshot, "best_batch", note)
    return batches


@pytest.mark.parametrize("method", ["grad-dot", "if-kfac"])
def test_a_run_in_cut_batches_gives_the_scores_of_one_batch(method, monkeypatch):
    torch.manual_seed(0)
    task = Task(Sequences(), "cross-entropy")
    train, test = sequences(24, 1), sequences(5, 2)
    made = dattri.method(method, **({} if method == "grad-dot" else {"damping": 0.1}))
    plan = made.attribute(task, train, test, dry_run=True)
    assert plan.train_batch == 6  # 8 MiB would be 7; a row with its ones is above 4 MiB
    fit_batches = noted(monkeypatch)
    fitted = made.fit(task, train)
    assert set(fit_batches) == {6}
    fit_batches.clear()
    influences = fitted.self_influence()
    assert fit_batches == [6]
    cut = fitted.attribute(test)
    monkeypatch.setattr(pages, "REUSED", 2**40)
    whole = made.attribute(task, train, test)
    assert made.attribute(task, train, test, dry_run=True).train_batch == 24
    assert torch.allclose(influences, made.fit(task, train).self_influence(), rtol=1e-4)
    scale = whole.values.abs().max()
    assert torch.allclose(cut.values, whole.values, rtol=1e-4, atol=1e-5 * float(scale))


def test_rows_that_are_held_make_no_tensors_and_those_of_a_pool_do(monkeypatch):
    """They are computed in batches like those of the fit on them, of 24 or of 6."""
    torch.manual_seed(0)
    task = Task(Sequences(), "cross-entropy")
    train, pool = sequences(24, 1), sequences(9, 2)
    batches = noted(monkeypatch)
    fitted = dattri.method("trak", dim=8).fit(task, train)
    held = fitted._fit(fitted._first())
    assert batches == [6, 6]
    assert held.outline.held > 0
    assert held.outline.tensors == ()
    of_pool = pools.of_pool(held, Examples.of(pool, "pool"), task.device)
    assert LENGTH * WIDTH * 4 in of_pool.outline.tensors


def test_an_example_counts_where_its_pass_keeps_no_tensor():
    """The sum of the outputs of a linear layer: what it keeps are its input and its weights."""
    task = Task(nn.Linear(3, 2), lambda model, batch: model(batch[0]).sum(1))
    train = normal(5, 3, seed=1).float(), torch.arange(5) % 2
    fitted = dattri.method("grad-dot").fit(task, train)
    held = fitted._fit(fitted._first())
    assert activation_sizes(held.chain.source.evaluator, train) == ()
    assert held.outline.activations == LEAST
    of_pool = pools.of_pool(
        attrs.evolve(held, outline=attrs.evolve(held.outline, activations=0)),
        Examples.of(train, "pool"),
        task.device,
    )
    assert of_pool.outline.activations == LEAST


@pytest.mark.parametrize(
    ("row", "count", "taken"),
    [
        (2**20, 20, 20),  # all are kept
        (2**20, 33, 17),
        (2**20, 100, 25),
        (4 * 2**20, 100, 8),
        (4 * 2**20 + 1, 100, 100),  # seven rows share too little
        (0, 5, 5),
        (2**20, 0, 0),
    ],
)
def test_rows_are_taken_in_even_pieces_whose_memory_is_reused(row, count, taken):
    assert reused_rows(row, count) == taken
