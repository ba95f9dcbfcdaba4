"""The plan of a run: a memory budget in; batch sizes, query groups and the route of queries out.

Everything is decided from bytes and multiply-adds, never from a clock, so that a run repeats bit
for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

import attrs
from attrs import field, frozen

from dattri_core.errors import MemoryBudgetError, format_bytes
from dattri_core.pages import NUMBER, best_batch

MAXIMUM_BATCH = 2048
SCORE_BYTES = 8
"""Of one number of a tile, at most."""
PAIR_NUMBERS = 3
"""Numbers of a pair alive beside its totals: a block's part, its slices, the result."""
COLUMN_NUMBERS = 5
"""More numbers of a pair where whole columns are kept: joined, their scores, what sorting takes."""
SLAB_SHARE = 8
"""One part in so many of the budget holds the queries of one block while they are expanded."""
DEFERRED_SHARE = 0.6
"""Of the room that deferred queries may take; how many do is weighed against larger batches.

What is left holds a train batch and, with one slab, the intermediates of a contraction: a quarter
of the budget.
"""
RESERVE = 5
"""One part in so many of the budget is left to the allocator where more than the least is there: it
keeps pages between tensors of other sizes, 0.4 of 4 GiB for a transformer of 10.7M parameters.
"""
SWEPT_TERMS = 3
"""Multiply-adds of a pair that all dampings of a sweep take together, for each number of a row."""
Place: TypeAlias = Literal["host", "disk"]
TRANSFER: Mapping[Place, int] = {"host": 1000, "disk": 50}
"""Multiply-adds that a device does while one byte comes from the host, a processor from a disk."""
KEPT: Mapping[Place | None, str] = {None: "queries", "host": "on the host", "disk": "on disk"}
NUMBER_BYTES = 4
"""Of a number of a query."""
AWAY_SHARE = 2
"""Queries off the device take one part in so many of what is free where they wait."""


@frozen
class Route:
    """One way for test rows to reach the train rows. Bytes and multiply-adds are of one row.

    A query passes the first ``cut`` steps of the test side when it is made. With ``deferred`` the
    others wait for each train batch, one block at a time; without, nothing is left to do.

    Args:
        deferred: Whether queries are expanded at every train batch.
        cut: Steps of the test side that are done when the query is made.
        train_row: Bytes of the largest block of a train row.
        test_row: Bytes of a test row while its batch passes the steps.
        kept: Bytes of a query while it waits for train rows.
        making: Bytes beside that, for every query of a group, while the group is made.
        expanded: Bytes of one query's largest block while it passes the steps left; 0: none are.
        once: Multiply-adds to make a query.
        each: Multiply-adds to expand a query, at every train batch.
        train: Multiply-adds of the train side, for every train row.
        split: Whether the train side carries its half of the inverse.
        offloaded: Where queries wait, if not on the device: in the memory of the host, or on disk.
        swept: Whether the queries of all dampings of a sweep wait as one, without their dampings.
        pair: Multiply-adds of one query, at one damping, and one train row.
    """

    deferred: bool
    cut: int
    train_row: int
    test_row: int
    kept: int
    making: int = 0
    expanded: int = 0
    once: int = 0
    each: int = 0
    train: int = 0
    split: bool = False
    offloaded: Place | None = None
    swept: bool = False
    pair: int = 0

    def __str__(self) -> str:
        way = "deferred, expanded a block at a time" if self.deferred else "resident"
        if self.split:
            way += ", both sides in the basis of the inverse"
        if self.swept:
            way += ", dampings interpolated"
        return way + (f", kept {KEPT[self.offloaded]}" if self.offloaded else "")


@frozen
class Costs:
    """What one example costs, as measured on a sample and read off the space.

    Args:
        activations: Bytes that a forward and backward pass keeps.
        gradient: Multiply-adds of the pass.
        routes: The ways to go, the one to prefer among equals first.
        tensors: Bytes of each tensor that an example makes on a processor; see `pages`.
    """

    activations: int
    gradient: int
    routes: tuple[Route, ...]
    tensors: tuple[int, ...] = ()

    @property
    def choices(self) -> tuple[Route, ...]:
        """Return the routes, then the same with queries on the host, then on disk.

        Whole queries that steps work on all at once, or that are formed for good, are in memory.
        """
        return self.routes + tuple(
            attrs.evolve(
                route,
                offloaded=place,
                expanded=max(route.expanded, route.kept),
                each=route.each + transfer * route.kept,
            )
            for place, transfer in TRANSFER.items()
            for route in self.routes
            if not route.swept and (place == "host" or not route.making)
        )


@frozen
class Plan:
    """How a run fits its budget: sizes, passes over the data, and the bytes of each part.

    ``str(plan)`` is what ``dry_run=True`` shows.
    """

    budget: int
    train_batch: int
    test_batch: int
    query_group: int
    groups: int
    checkpoints: int
    n_train: int
    n_test: int
    shard: int
    slab: int  # bytes of the queries of one block while they are expanded
    route: Route
    choice: int  # which of `Costs.choices` the route is, from 1
    bytes: dict[str, int] = field(factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def train_passes(self) -> int:
        """Return how often gradients of the whole train set are computed to score it."""
        return self.groups * self.checkpoints

    def __str__(self) -> str:
        lines = [
            f"budget            {format_bytes(self.budget)}",
            f"train examples    {self.n_train} in batches of {self.train_batch}",
            f"test examples     {self.n_test} in batches of {self.test_batch}",
            f"query groups      {self.groups} of {self.query_group}",
            f"queries           {self.route}",
            f"checkpoints       {self.checkpoints}",
            f"train passes      {self.train_passes} to score",
            *(f"{name:<17} {format_bytes(size)}" for name, size in self.bytes.items()),
            *self.notes,
        ]
        return "\n".join(lines)


@frozen
class Work:
    """What a run has to do.

    Args:
        n_train: Train examples.
        n_test: Columns of the scores.
        checkpoints: Passes over everything.
        result_bytes: Of the scores, where they are kept in memory.
        variants: Test sides that differ, such as the dampings of a sweep.
        readings: Totals that are kept for every pair of rows.
        summed: Test examples behind one column, where it is the sum of their rows.
        held: Bytes of train rows and fitted inverses that are in memory already.
        column: Whether the scorer sees all train rows at once, so that totals wait for the last.
    """

    n_train: int
    n_test: int
    checkpoints: int = 1
    result_bytes: int = 0
    variants: int = 1
    readings: int = 1
    summed: int = 0
    held: int = 0
    column: bool = False


def make_plan(
    budget: int,
    costs: Costs,
    work: Work,
    *,
    away: Mapping[Place, int] | None = None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Choose the route of the queries with the fewest multiply-adds, and the sizes that fit it.

    Resident queries pay for themselves once, but each further group of them costs another pass over
    the train set, so as many are taken at once as half of the budget holds. Deferred queries are
    smaller, and pay again at every train batch.

    Args:
        budget: Bytes.
        costs: Of one example.
        work: What is to be done.
        away: Bytes that are free where queries may wait instead of on the device.
        notes: Shown with the plan.

    Raises:
        MemoryBudgetError: Not even one query and one train example fit; says what would.
    """
    best: tuple[int, Plan] | None = None
    for position, route in enumerate(costs.choices):
        free = (away or {}).get(route.offloaded, 0) if route.offloaded else None
        for plan in _sized(budget, costs, work, route, free, position + 1):
            done = multiply_adds(plan, costs, work)
            if best is None or done < best[0]:
                best = done, attrs.evolve(plan, notes=notes)
    if best is None:
        raise _too_little(budget, costs, work)
    return best[1]


def multiply_adds(plan: Plan, costs: Costs, work: Work) -> int:
    """Return the multiply-adds of a plan at one checkpoint, without those that all plans share."""
    route, batches = plan.route, -(-work.n_train // plan.train_batch)
    passes = plan.groups * work.n_train * (costs.gradient + route.train)
    repeats = batches * route.each * (work.variants if route.deferred else 1)
    done = passes + work.n_test * (route.once + repeats)
    if work.variants > 1:  # one damping is met in the same way on every route
        products = min(SWEPT_TERMS, work.variants) if route.swept else work.variants
        done += work.n_train * work.n_test * route.pair * products
    return done


@frozen
class _Needs:
    """Bytes of one train and one test example, of one query, and of the slabs, on one route."""

    train: int
    test: int
    query: int
    slabs: int  # beside one another: queries expanded, and train rows formed to meet them
    slab: int  # the least that one takes

    @staticmethod
    def of(route: Route, costs: Costs, work: Work) -> _Needs:
        held = 0 if route.offloaded else _held(route, work)
        return _Needs(
            train=max(1, costs.activations + route.train_row),
            test=max(1, costs.activations + route.test_row),
            query=max(1, held + route.making + _pair(work) + _column(work)),
            slabs=2 if route.deferred else 1 if route.expanded else 0,
            slab=max(1, route.expanded),
        )

    @property
    def example(self) -> int:
        return max(self.train, self.test)

    @property
    def least(self) -> int:
        """Return the bytes for one example, one query and one row in each slab."""
        return self.example + self.query + self.slabs * self.slab


def _sized(
    budget: int, costs: Costs, work: Work, route: Route, away: int | None, choice: int
) -> Iterator[Plan]:
    """Yield the plans of one route that fit: one where queries are resident, else several."""
    needs = _Needs.of(route, costs, work)
    left = budget - work.result_bytes - work.held
    if left < needs.least:
        return
    left = max(needs.least, left - budget // RESERVE)
    slab = 0
    if needs.slabs:
        slab = min(left // SLAB_SHARE, (left - needs.example - needs.query) // needs.slabs)
        slab = max(needs.slab, slab)
    room = left - needs.slabs * slab
    share = DEFERRED_SHARE if route.deferred else 0.5
    most = min(work.n_test, int(min(room * share, room - needs.example) // needs.query))
    most = max(1, most)
    if away is not None:
        most = min(most, away // AWAY_SHARE // max(1, _held(route, work)))
        if not most:
            return
    groups = -(-work.n_test // most)
    while groups <= work.n_test:
        group = -(-work.n_test // groups)  # even groups
        groups = max(groups + 1, groups * 9 // 8)
        rest = room - group * needs.query
        # Half of the rest: contractions and the allocator need room beside the batch itself.
        train = int(rest * 0.5 // (needs.train + _pair(work) * group))
        most = max(1, min(work.n_train, MAXIMUM_BATCH, train))
        train = best_batch(costs.tensors, work.n_train, most, group * _each_batch(route, work))
        test = max(1, min(work.summed or group, MAXIMUM_BATCH, int(rest * 0.5 // needs.test)))
        test = best_batch(costs.tensors, work.summed or group, test)
        columns = SCORE_BYTES * max(1, work.n_test) * work.readings
        yield Plan(
            budget=budget,
            train_batch=train,
            test_batch=test,
            query_group=group,
            groups=-(-work.n_test // group),
            checkpoints=work.checkpoints,
            n_train=work.n_train,
            n_test=work.n_test,
            shard=max(train, min(work.n_train, int(0.25 * rest // columns))),
            slab=slab,
            route=route,
            choice=choice,
            bytes={
                KEPT[route.offloaded]: group * _held(route, work),
                "query work": group * route.making + needs.slabs * slab,
                "columns": group * _column(work),
                "train batch": train * needs.train,
                "scores": work.result_bytes,
            },
        )
        if not route.deferred or most == min(work.n_train, MAXIMUM_BATCH):
            return


def _pair(work: Work) -> int:
    return SCORE_BYTES * (work.readings + PAIR_NUMBERS)


def _column(work: Work) -> int:
    """Return the bytes of one column of totals, where it is kept until every train row has come."""
    if not work.column:
        return 0
    return work.n_train * SCORE_BYTES * (2 * work.readings + COLUMN_NUMBERS)


def _held(route: Route, work: Work) -> int:
    return route.kept * (1 if route.deferred or route.swept else work.variants)


def _each_batch(route: Route, work: Work) -> int:
    """Return the multiply-adds that a query costs again for every train batch."""
    if route.deferred:
        return route.each * work.variants
    return route.each + _held(route, work) // NUMBER_BYTES * NUMBER


def _too_little(budget: int, costs: Costs, work: Work) -> MemoryBudgetError:
    needs = min((_Needs.of(r, costs, work) for r in costs.routes), key=lambda n: n.least)
    query = needs.query + needs.slabs * needs.slab
    least = needs.least + work.result_bytes + work.held
    return MemoryBudgetError(
        f"memory: the budget of {format_bytes(budget)} does not hold one example "
        f"({format_bytes(needs.example)}), one query ({format_bytes(query)}) and the scores "
        f"({format_bytes(work.result_bytes)}); give at least {format_bytes(least)}, or out= to "
        "keep the scores on disk, or attribute fewer parameters"
    )
