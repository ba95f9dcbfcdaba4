"""Runs that are made to take a route, in pieces of chosen sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import pytest

from dattri_core import run_plan as engine
from dattri_core.plans import Costs, Route

SMALL = {"query_group": 2, "groups": 3, "train_batch": 4, "test_batch": 1, "shard": 4}
"""Of 5 test and 9 train examples."""
MANY = {"query_group": 5, "groups": 1, "train_batch": 2, "test_batch": 2, "shard": 4}
"""More queries at once than train rows."""


@contextmanager
def taking(choice: int, slab: int = 2**20, **sizes: int) -> Iterator[list[Route]]:
    """Let runs inside the block take the route of a number, from 1; it is noted in the list.

    A run that has no such route takes its plainest one and notes nothing.
    """
    taken: list[Route] = []
    original = engine.make_plan

    def plan(budget, costs, work, **named):
        made = original(budget, costs, work, **named)
        route = costs.choices[choice - 1] if choice <= len(costs.choices) else costs.routes[0]
        if choice <= len(costs.choices):
            taken.append(route)
        needs_slab = route.deferred or route.offloaded or bool(route.expanded)
        return attrs.evolve(
            made,
            route=route,
            choice=min(choice, len(costs.choices)),
            slab=slab if needs_slab else 0,
            **sizes,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "make_plan", plan)
        yield taken


def costs_seen(run) -> Costs:
    """Return the costs that a run was planned with."""
    seen: list[Costs] = []
    original = engine.make_plan

    def plan(budget, costs, work, **named):
        seen.append(costs)
        return original(budget, costs, work, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "make_plan", plan)
        run()
    return seen[0]
