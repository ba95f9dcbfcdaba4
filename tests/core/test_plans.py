"""Plans: they keep to their budget, cover all examples, and take the route with the least work."""

import math
import re

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dattri_core import MemoryBudgetError, format_bytes
from dattri_core.plans import (
    MAXIMUM_BATCH,
    RESERVE,
    Costs,
    Route,
    Work,
    make_plan,
    multiply_adds,
)

KIB, MIB, GIB = 2**10, 2**20, 2**30

size = st.integers(1, 32 * KIB)
work_of_one = st.integers(0, 10**6)
resident = st.builds(
    Route,
    deferred=st.just(False),
    cut=st.just(2),
    train_row=size,
    test_row=size,
    kept=size,
    making=st.integers(0, 32 * KIB),
    expanded=st.sampled_from([0, 0, KIB, 64 * KIB]),
    once=work_of_one,
    train=work_of_one,
)
deferred = st.builds(
    Route,
    deferred=st.just(True),
    cut=st.just(1),
    train_row=size,
    test_row=size,
    kept=size,
    expanded=st.sampled_from([0, KIB, 64 * KIB]),
    once=work_of_one,
    each=work_of_one,
    train=work_of_one,
    split=st.booleans(),
)
costs_of = {
    "resident": st.builds(Costs, size, work_of_one, st.tuples(resident)),
    "any": st.builds(
        Costs,
        size,
        work_of_one,
        st.builds(
            lambda first, more: (first, *more), resident, st.lists(st.one_of(resident, deferred))
        ),
    ),
}
works = st.builds(
    Work,
    n_train=st.integers(1, 5000),
    n_test=st.integers(1, 500),
    checkpoints=st.integers(1, 3),
    result_bytes=st.integers(0, MIB),
    variants=st.integers(1, 3),
    readings=st.integers(1, 5),
    summed=st.sampled_from([0, 0, 100]),
    column=st.booleans(),
)


def pair(work):
    """Return the bytes of one pair of rows: a total for each reading, and three numbers beside."""
    return 8 * (work.readings + 3)


def column(work):
    """Return the bytes of a column of totals that waits for all train rows; tiles keep none."""
    return 8 * (2 * work.readings + 5) * work.n_train if work.column else 0


def held(route, work):
    if route.offloaded:
        return 0
    return route.kept * (1 if route.deferred else work.variants)


def slabs(route):
    return 2 if route.deferred else int(bool(route.expanded))


def least(costs, work):
    """Return the bytes for one example and one query on the thriftiest route."""
    return work.result_bytes + min(
        costs.activations
        + max(route.train_row, route.test_row)
        + held(route, work)
        + route.making
        + pair(work)
        + column(work)
        + slabs(route) * max(1, route.expanded)
        for route in costs.routes
    )


def needed(plan, costs, work):
    """Return the bytes alive at the worst moment of a run."""
    route = plan.route
    queries = plan.query_group * (held(route, work) + route.making + column(work))
    train = costs.activations + route.train_row + pair(work) * plan.query_group
    test = costs.activations + route.test_row
    batch = max(plan.train_batch * train, plan.test_batch * test)
    return queries + batch + slabs(route) * plan.slab + work.result_bytes


@settings(max_examples=300, deadline=None)
@given(
    costs_of["any"],
    works,
    st.integers(0, 8 * MIB),
    st.dictionaries(st.sampled_from(["host", "disk"]), st.sampled_from([0, KIB, GIB])),
)
def test_a_plan_keeps_to_its_budget_and_covers_all_examples(costs, work, extra, away):
    plan = make_plan(least(costs, work) + extra, costs, work, away=away)
    assert needed(plan, costs, work) <= plan.budget
    assert plan.route == costs.choices[plan.choice - 1]
    assert 1 <= plan.query_group <= work.n_test
    assert (plan.groups - 1) * plan.query_group < work.n_test <= plan.groups * plan.query_group
    assert 1 <= plan.train_batch <= min(work.n_train, MAXIMUM_BATCH)
    assert 1 <= plan.test_batch <= min(work.summed or plan.query_group, MAXIMUM_BATCH)
    assert plan.train_batch <= plan.shard <= work.n_train
    assert plan.train_passes == plan.groups * work.checkpoints
    assert bool(plan.slab) == bool(slabs(plan.route))
    assert plan.slab >= plan.route.expanded
    if plan.route.offloaded:
        here = attrs.evolve(plan.route, offloaded=None)
        assert plan.query_group * held(here, work) <= away[plan.route.offloaded] / 2


@settings(max_examples=200, deadline=None)
@given(costs_of["resident"], works, st.integers(0, 8 * MIB), st.integers(0, 8 * MIB))
def test_more_memory_never_costs_more_passes(costs, work, extra, more):
    small = make_plan(least(costs, work) + extra, costs, work)
    large = make_plan(small.budget + more, costs, work)
    assert large.groups <= small.groups
    assert large.query_group >= small.query_group
    if large.groups == small.groups and not costs.routes[0].expanded:
        assert large.train_batch >= small.train_batch
        assert large.test_batch >= small.test_batch


@settings(max_examples=200, deadline=None)
@given(costs_of["any"], works, st.integers(0, 8 * MIB))
def test_no_route_that_fits_has_less_work(costs, work, extra):
    budget = least(costs, work) + extra
    plan = make_plan(budget, costs, work)
    for route in costs.routes:
        alone = attrs.evolve(costs, routes=(route,))
        try:
            other = make_plan(budget, alone, work)
        except MemoryBudgetError:
            continue
        assert multiply_adds(plan, costs, work) <= multiply_adds(other, alone, work)


@settings(max_examples=100, deadline=None)
@given(costs_of["any"], works)
def test_what_does_not_fit_is_refused_with_the_bytes_that_would(costs, work):
    enough = least(costs, work)
    with pytest.raises(MemoryBudgetError) as caught:
        make_plan(enough - 1, costs, work)
    message = str(caught.value)
    for part in (
        f"the budget of {format_bytes(enough - 1)} does not hold",
        "one example (",
        "one query (",
        f"the scores ({format_bytes(work.result_bytes)})",
        f"give at least {format_bytes(enough)}",
        "out=",
    ):
        assert part in message
    make_plan(enough, costs, work)


# --- which route ----------------------------------------------------------------------------------
PLAIN = Route(deferred=False, cut=2, train_row=KIB, test_row=KIB, kept=100 * KIB, once=10**6)
LATER = Route(deferred=True, cut=1, train_row=KIB, test_row=KIB, kept=KIB, expanded=KIB, each=10**6)
COSTS = Costs(KIB, 10**6, (PLAIN, LATER))


def test_queries_that_fit_are_resident():
    plan = make_plan(GIB, COSTS, Work(n_train=60, n_test=7, result_bytes=60 * 7 * 4))
    assert plan.route == PLAIN
    assert (plan.train_batch, plan.test_batch, plan.query_group, plan.groups) == (60, 7, 7, 1)
    assert plan.shard == 60


def test_many_queries_are_deferred_where_that_saves_passes():
    """64 MiB hold 300 resident queries, so four passes; or all of them, deferred."""
    work = Work(n_train=2000, n_test=1000)
    plan = make_plan(64 * MIB, COSTS, work)
    assert plan.route == LATER
    assert plan.groups == 1
    only = attrs.evolve(COSTS, routes=(PLAIN,))
    assert multiply_adds(plan, COSTS, work) < multiply_adds(
        make_plan(64 * MIB, only, work), only, work
    )


def test_an_expansion_that_costs_more_than_a_pass_is_not_repeated():
    dear = attrs.evolve(COSTS, routes=(PLAIN, attrs.evolve(LATER, each=10**9)))
    assert make_plan(64 * MIB, dear, Work(n_train=2000, n_test=1000)).route == PLAIN


def test_a_train_batch_of_deferred_queries_is_weighed_against_their_number():
    """Where passes are cheap and expansions dear, more groups leave room for larger batches."""
    work = Work(n_train=2000, n_test=60_000, result_bytes=0)
    routes = (attrs.evolve(LATER, each=10**6),)
    even = make_plan(64 * MIB, Costs(KIB, 10**6, routes), work)
    cheap = make_plan(64 * MIB, Costs(KIB, 10**3, routes), work)
    assert cheap.groups > even.groups
    assert cheap.train_batch > even.train_batch


def test_queries_wait_on_the_host_where_the_device_is_small_and_the_host_is_not():
    one = Costs(KIB, 10**9, (PLAIN,))
    work = Work(n_train=2000, n_test=1000)
    assert not make_plan(64 * MIB, one, work).route.offloaded
    plan = make_plan(64 * MIB, one, work, away={"host": GIB})
    assert plan.route.offloaded == "host"
    assert plan.groups == 1
    assert str(plan.route) == "resident, kept on the host"
    assert not make_plan(GIB, one, work, away={"host": GIB}).route.offloaded


def test_queries_wait_on_disk_where_reading_them_costs_less_than_a_pass():
    """A thousand of 100 KiB: four groups of 64 MiB, or one that every train batch reads."""
    work = Work(n_train=2000, n_test=1000)
    passes = Costs(KIB, 10**9, (PLAIN,))
    plan = make_plan(64 * MIB, passes, work, away={"disk": GIB})
    assert (plan.route.offloaded, plan.groups) == ("disk", 1)
    assert str(plan.route) == "resident, kept on disk"
    assert make_plan(64 * MIB, passes, work, away={"disk": 10 * KIB}).route.offloaded is None
    cheap = Costs(KIB, 10**3, (PLAIN,))
    assert make_plan(64 * MIB, cheap, work, away={"disk": GIB}).route.offloaded is None
    whole = Costs(KIB, 10**9, (attrs.evolve(PLAIN, making=KIB),))
    assert make_plan(64 * MIB, whole, work, away={"disk": GIB}).route.offloaded is None


def test_whole_columns_wait_for_the_last_train_row_and_count():
    """80 MiB hold 300 queries of 100 KiB, and of 100,000 totals each no more than five."""
    costs = attrs.evolve(COSTS, routes=(PLAIN,))
    tiles = make_plan(80 * MIB, costs, Work(n_train=100_000, n_test=300))
    whole = make_plan(80 * MIB, costs, Work(n_train=100_000, n_test=300, column=True))
    assert (tiles.groups, whole.query_group) == (1, 5)
    assert whole.bytes["columns"] == 5 * 100_000 * 8 * 7
    assert tiles.bytes["columns"] == 0
    assert "columns           26.7 MiB" in str(whole)
    assert make_plan(GIB, costs, Work(n_train=100_000, n_test=300, column=True)).groups < 30


def test_variants_of_resident_queries_are_held_each_and_of_deferred_ones_once():
    work = Work(n_train=60, n_test=40, variants=10)
    plain = make_plan(64 * MIB, attrs.evolve(COSTS, routes=(PLAIN,)), work)
    later = make_plan(64 * MIB, attrs.evolve(COSTS, routes=(LATER,)), work)
    assert plain.bytes["queries"] == 10 * plain.query_group * PLAIN.kept
    assert later.bytes["queries"] == 40 * LATER.kept


def test_a_plan_reads_as_text():
    plan = make_plan(
        4 * MIB,
        Costs(KIB, 1, (attrs.evolve(PLAIN, once=0),)),
        Work(n_train=100, n_test=50, checkpoints=3, result_bytes=100 * 50 * 4),
        notes=("inner of layer: ghost",),
    )
    text = str(plan)
    assert f"query groups      {plan.groups} of {plan.query_group}\n" in text
    assert "queries           resident\n" in text
    assert f"train passes      {plan.groups * 3} to score" in text
    assert "budget            4.0 MiB" in text
    assert "scores            19.5 KiB" in text
    assert text.endswith("inner of layer: ghost")
    told = str(attrs.evolve(plan, route=attrs.evolve(LATER, split=True)))
    assert "deferred, expanded a block at a time, both sides in the basis of the inverse" in told


def test_a_share_of_the_budget_is_left_to_the_allocator_but_for_the_least():
    costs, work = attrs.evolve(COSTS, routes=(PLAIN,)), Work(n_train=100_000, n_test=300)
    for budget in (8 * MIB, 80 * MIB, GIB):
        used = sum(make_plan(budget, costs, work).bytes.values())
        assert used <= budget - budget // RESERVE
    with pytest.raises(MemoryBudgetError) as refused:
        make_plan(1, costs, work)
    (least,) = re.findall(r"at least ([\d.]+) KiB", str(refused.value))
    plan = make_plan(math.ceil((float(least) + 0.1) * KIB), costs, work)
    assert (plan.query_group, plan.train_batch) == (1, 1)
