"""Learning a model's habits: passes over the sample that hold every block to the end."""

from __future__ import annotations

from typing import Any

from dattri_core import Block, Evaluator, InputError, batch_size
from dattri_parts.sources.capture import Pass
from dattri_parts.sources.habits import Habits, WrittenInputError, WrittenOutputError
from dattri_parts.sources.plan import SourcePlan
from dattri_parts.sources.resolve import CURE


def rehearse(
    evaluator: Evaluator, plan: SourcePlan, habits: Habits, sample: Any, role: Any
) -> None:
    """Learn on the sample which tensors are written into later and which calls report when."""
    sites = plan.sites

    def attempt() -> Pass:
        while True:
            once = Pass(evaluator, plan, habits, role, batch_size(sample), _drop, hold=True)
            try:
                once.run(lambda model: evaluator.total_of(model, sample, role))
            except WrittenInputError as error:
                if error.module in habits.copied:
                    raise
                habits.copied.add(error.module)
            except WrittenOutputError as error:
                habits.detached.add(error.module)
            except (RuntimeError, IndexError) as error:
                if "memory" in str(error):
                    raise
                raise InputError(
                    "per-example: the backward pass of the first examples fails with hooks on the "
                    f"modules: {str(error).strip().splitlines()[0]}; {CURE}"
                ) from error
            else:
                return once

    done = attempt()
    if any(done.unheard(site.module) for site in sites):
        # A reentrant checkpoint has gradients only if one of its inputs requires one.
        own = {site.module for site in sites}
        before = habits.starters
        habits.starters = tuple(
            module
            for module in evaluator.task.model.modules()
            if module not in own
            and any(p is not None and p.is_floating_point() for p in module._parameters.values())
        )
        again = attempt()
        if sum(again.reports.values()) > sum(done.reports.values()):
            done = again
        else:
            habits.starters = before
    habits.recomputed[role] = {
        module
        for module, count in done.reports.items()
        if done.silent.get(module) and count > done.calls.get(module, 0)
    }
    habits.complete[role] = {site.module for site in sites if not done.missing(site.module)}


def _drop(name: str, block: Block) -> None:
    pass
