"""The memory budget: how it is read, and plans that keep to it."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dattri_core import InputError, MemoryBudgetError, format_bytes
from dattri_core.memory import (
    DEFAULT_SHARE,
    MAXIMUM_BATCH,
    Costs,
    free_bytes,
    is_out_of_memory,
    make_plan,
    parse_bytes,
)

CPU = torch.device("cpu")
KIB, MIB, GIB = 2**10, 2**20, 2**30


# --- reading a budget ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("16GiB", 16 * GIB),
        ("16 gib", 16 * GIB),
        ("16G", 16 * GIB),
        ("16GB", 16 * 10**9),
        ("1.5MiB", 3 * MIB // 2),
        (" 2048 KiB ", 2 * MIB),
        ("2097152", 2 * MIB),
        ("2097152b", 2 * MIB),
        (".5TiB", GIB * 512),
        ("1tb", 10**12),
        (3 * MIB, 3 * MIB),
        (3.0 * MIB, 3 * MIB),
    ],
)
def test_a_budget_is_a_number_with_a_unit(text, count):
    assert parse_bytes(text, CPU) == count


@pytest.mark.parametrize(
    "text", ["", "lots", "16 XiB", "GiB", "1.2.3GiB", ".", ".GiB", "-1GiB", "1e9", "16GiB!", "nan"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(InputError, match=rf"^memory: {re.escape(repr(text))} is not a number"):
        parse_bytes(text, CPU)


@pytest.mark.parametrize("count", [0, -1, -(2**40), 1023, MIB - 1, "1023KiB", "0"])
def test_too_little_is_refused(count):
    with pytest.raises(InputError, match=r"too little to work in; give 1 MiB or more"):
        parse_bytes(count, CPU)


@pytest.mark.parametrize("count", [float("nan"), float("inf"), True, [16]])
def test_numbers_that_are_no_bytes_are_refused(count):
    with pytest.raises(InputError, match=r"^memory: .* is not a number of bytes"):
        parse_bytes(count, CPU)


def test_the_default_is_a_share_of_what_is_free():
    free, budget = free_bytes(CPU), parse_bytes(None, CPU)
    assert 0 < free < 2**50
    # Other processes come and go between the two readings.
    assert 0.5 * free * DEFAULT_SHARE <= budget <= 2 * free * DEFAULT_SHARE


# --- plans --------------------------------------------------------------------------------------
sizes = st.integers(0, 32 * KIB)
costs = st.builds(
    Costs,
    activations=st.integers(1, 32 * KIB),
    train_row=st.integers(1, 32 * KIB),
    query=st.integers(1, 32 * KIB),
    query_work=sizes,
)
runs = st.fixed_dictionaries(
    {
        "n_train": st.integers(1, 5000),
        "n_test": st.integers(1, 500),
        "checkpoints": st.integers(1, 3),
        "result_bytes": st.integers(0, MIB),
    }
)


def needed(plan, costs):
    """Return the bytes alive at the worst moment of a run; a pair takes 32 at most."""
    per_row = costs.activations + costs.train_row
    queries = plan.query_group * (costs.query + costs.query_work)
    batch = max(plan.train_batch * (per_row + 32 * plan.query_group), plan.test_batch * per_row)
    return queries + batch + plan.bytes["scores"]


@settings(max_examples=300, deadline=None)
@given(costs, runs, st.integers(0, 8 * MIB))
def test_a_plan_keeps_to_its_budget_and_covers_all_examples(costs, run, extra):
    least = costs.activations + costs.train_row + costs.query + costs.query_work + 32
    plan = make_plan(least + run["result_bytes"] + extra, costs, **run)
    assert needed(plan, costs) <= plan.budget
    assert 1 <= plan.query_group <= run["n_test"]
    assert (plan.groups - 1) * plan.query_group < run["n_test"] <= plan.groups * plan.query_group
    assert 1 <= plan.train_batch <= min(run["n_train"], MAXIMUM_BATCH)
    assert 1 <= plan.test_batch <= min(plan.query_group, MAXIMUM_BATCH)
    assert plan.train_batch <= plan.shard <= run["n_train"]
    assert plan.train_passes == plan.groups * run["checkpoints"]


@settings(max_examples=200, deadline=None)
@given(costs, runs, st.integers(0, 8 * MIB), st.integers(0, 8 * MIB))
def test_more_memory_never_costs_more_passes(costs, run, extra, more):
    least = costs.activations + costs.train_row + costs.query + costs.query_work + 32
    small = make_plan(least + run["result_bytes"] + extra, costs, **run)
    large = make_plan(small.budget + more, costs, **run)
    assert large.groups <= small.groups
    assert large.query_group >= small.query_group
    if large.groups == small.groups:
        assert large.train_batch >= small.train_batch
        assert large.test_batch >= small.test_batch


@settings(max_examples=100, deadline=None)
@given(costs, runs)
def test_what_does_not_fit_is_refused_with_the_bytes_that_would(costs, run):
    least = costs.activations + costs.train_row + costs.query + costs.query_work + 32
    least += run["result_bytes"]
    with pytest.raises(MemoryBudgetError) as caught:
        make_plan(least - 1, costs, **run)
    message = str(caught.value)
    for part in (
        f"the budget of {format_bytes(least - 1)} does not hold",
        f"one train example ({format_bytes(costs.activations + costs.train_row)})",
        f"one query ({format_bytes(costs.query + costs.query_work + 32)})",
        f"the scores ({format_bytes(run['result_bytes'])})",
        f"give at least {format_bytes(least)}",
        "out=",
    ):
        assert part in message
    make_plan(least, costs, **run)


def test_a_plan_with_ample_memory_takes_everything_at_once():
    plan = make_plan(
        GIB, Costs(100, 100, 100, 100), n_train=60, n_test=7, checkpoints=1, result_bytes=60 * 7 * 4
    )
    assert (plan.train_batch, plan.test_batch, plan.query_group, plan.groups) == (60, 7, 7, 1)
    assert plan.shard == 60


def test_a_plan_reads_as_text():
    plan = make_plan(
        4 * MIB,
        Costs(KIB, KIB, 100 * KIB, 0),
        n_train=100,
        n_test=50,
        checkpoints=3,
        result_bytes=100 * 50 * 4,
        notes=("inner of layer: ghost",),
    )
    text = str(plan)
    assert f"query groups      {plan.groups} of {plan.query_group}\n" in text
    assert f"train passes      {plan.groups * 3} to score" in text
    assert "budget            4.0 MiB" in text
    assert "scores            19.5 KiB" in text
    assert text.endswith("inner of layer: ghost")


# --- running out ----------------------------------------------------------------------------------
def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)  # what torch's CPU allocator says
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(MemoryBudgetError("already halved down to one"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
