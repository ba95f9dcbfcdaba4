"""Per-example gradients by hooks: one forward and one backward pass for the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from attrs import evolve, frozen
from torch import nn

from dattri_core import (
    Checkpoint,
    Evaluator,
    InputError,
    Task,
    batch_size,
    is_out_of_memory,
    take,
)
from dattri_parts.sources.axes import EXAMPLES
from dattri_parts.sources.bound import BoundPerExample, Role
from dattri_parts.sources.fallback import RepeatError
from dattri_parts.sources.finite import plain
from dattri_parts.sources.habits import Habits, UnseenCallError
from dattri_parts.sources.mingled import MANY, Mingled
from dattri_parts.sources.plan import make_plan
from dattri_parts.sources.rehearse import rehearse
from dattri_parts.sources.resolve import CURE, resolve, slots_of
from dattri_parts.sources.routed import routed


@frozen
class PerExample:
    """Rows g_b = d loss_b / d parameters, caught at each module in one pass over the batch.

    A layer's gradient is kept as its factors (`OuterBlock`) where it has them: for a linear layer
    dL_b/dW = sum_t e_bt x_bt^T with x its input and e the gradient at its output. Blocks stream in
    the order of the backward pass, so that one layer's rows are alive at a time. Which module kinds
    have a rule is a matter of registration (`LayerRule`); any other is differentiated by
    ``torch.func``, that module alone. Where a weight is used outside of its module as well, the
    module around it is.

    Source: Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799; Rochette et
    al., arXiv 1912.06015 (convolutions).
    """

    provides: ClassVar[frozenset[str]] = frozenset()

    def bind(self, task: Task, checkpoint: Checkpoint, sample: Any) -> BoundPerExample:
        """Learn the model's calls on a few examples, and check their rows against autograd.

        Args:
            task: The task.
            checkpoint: One of its checkpoints.
            sample: A few examples, on the device of the task. Calls are learned on the first
                three; their rows are compared among the first eight, in another order.

        Raises:
            InputError: The loss is unfit (see `Evaluator`), or a parameter takes part in it in a
                way that no module shows; the parameters are named.
        """
        with torch.inference_mode(False):
            return _bind(task, checkpoint, plain(sample))

    def reopen(self, task: Task, checkpoint: Checkpoint, sample: Any) -> BoundPerExample:
        """Learn the model's calls; of train rows one is compared, a store has the others."""
        with torch.inference_mode(False):
            return _bind(task, checkpoint, plain(sample), unseen=("train",))

    def move(self, bound: BoundPerExample, checkpoint: Checkpoint) -> BoundPerExample:
        """Return the source at other weights of the model; its modules' calls are known."""
        return BoundPerExample(bound.evaluator.moved_to(checkpoint), bound.plan, bound.habits)


def _bind(
    task: Task, checkpoint: Checkpoint, sample: Any, unseen: tuple[Role, ...] = ()
) -> BoundPerExample:
    """Return the bound source whose rows are those of autograd on the sample, but of roles unseen.

    Where those of a module are not (a weight that is used outside of it as well), or it cannot be
    run for one example, the module around it answers for its parameters.
    """
    _require_hooks(task.model)
    evaluator = Evaluator(task, checkpoint, take(sample, slice(0, EXAMPLES)), unseen)
    trio = take(sample, torch.arange(EXAMPLES) % batch_size(sample))
    look = Mingled.of(sample, evaluator, EXAMPLES if unseen else MANY)
    slots = slots_of(task.model, evaluator.selected)
    roles: tuple[Role, ...] = ("train",) if task.target is None else ("train", "test")
    refused: set[nn.Module] = set()
    rejected = routed(evaluator, trio, roles)
    ruleless: set[nn.Module] = set()
    first: Exception | None = None  # what was wrong with the modules of the parameters themselves
    while True:
        try:
            resolved = resolve(evaluator, slots, trio, refused, rejected, roles)
        except InputError:
            if first is None:
                raise
            raise first from None
        habits = Habits(resolved.layouts, refused=refused)
        bound = BoundPerExample(evaluator, make_plan(evaluator, resolved, ruleless), habits)
        try:
            for role in roles:
                rehearse(evaluator, bound.plan, bound.habits, trio, role)
            try:
                seen = bound.mismatches(look, roles, unseen)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(look) <= EXAMPLES + 1:
                    raise
                look = Mingled.of(sample, evaluator, EXAMPLES)  # large for its activations
                continue
            if seen.wrong and _try_strided(bound, set(seen.wrong)):
                seen = bound.mismatches(look, roles, unseen)
        except RepeatError as error:
            first = first or _unrepeated(error)
            rejected.add(error.module)
            continue
        except UnseenCallError as error:  # it does not get all examples: an expert, by routing
            first = first or error
            rejected.add(error.module)
            continue
        sites = {site.module: site for site in bound.plan.sites}
        if not seen.wrong:
            right = ruleless & set(sites)  # by itself: its layer rule was wrong
            if first is not None and right:
                raise first
            return bound
        faulty = {module for module, site in sites.items() if site.parameters & set(seen.wrong)}
        # A shared output, repeated or not, does not tell whose gradient is whose.
        misled = (faulty & _shared_in(habits)) - refused
        if misled:
            refused |= misled
            continue
        first = first or _mismatch(seen.wrong)
        if seen.mixed:
            raise first
        ruled = {module for module in faulty if sites[module].rule is not None}
        ruleless |= ruled
        rejected |= set() if ruled else faulty


def _require_hooks(model: nn.Module) -> None:
    scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise InputError(
            f"per-example: the module {scripted[0]!r} is a script, which takes no hooks; give the "
            f"module that was scripted, or {CURE}"
        )


def _unrepeated(error: RepeatError) -> InputError:
    return InputError(
        f"per-example: {type(error.module).__name__} cannot be run for one example of the first "
        f"ones ({error}), and neither can a module around it; {CURE}"
    )


def _mismatch(wrong: Mapping[str, float]) -> InputError:
    worst = ", ".join(f"{name!r} (by {off:.1e})" for name, off in list(wrong.items())[:6])
    return InputError(
        f"per-example: the rows of {worst} differ from autograd on a few examples, looked at "
        "in another order; the parameter takes part in the loss outside of its module's call "
        "(weight decay in the loss, a weight used directly), or its module mixes examples, or gets "
        "them in an order of its own (a loss that sorts the batch); "
        f"{CURE}, or leave the parameter out with parameters='!{next(iter(wrong))}'"
    )


def _shared_in(habits: Habits) -> set[nn.Module]:
    """Return the modules that have an output which examples share, repeated or not."""
    return {
        module
        for layouts in habits.layouts.values()
        for module, calls in layouts.items()
        if any(call.is_spread or call.shared for call in calls)
    }


def _try_strided(bound: BoundPerExample, wrong: set[str]) -> bool:
    """Read flattened axes of the modules at fault as position by position; False if there are none.

    From shapes alone ``[B T, D]`` may be B runs of T or T runs of B.
    """
    faulty = {site.module for site in bound.plan.sites if site.parameters & wrong}
    changed = False
    turned: dict[str, dict[nn.Module, list[Any]]] = {}
    for role, layouts in bound.habits.layouts.items():
        turned[role] = {}
        for module, calls in layouts.items():
            new = [
                evolve(
                    call,
                    inputs=tuple(_strided(axis) for axis in call.inputs),
                    outputs=tuple(_strided(axis) for axis in call.outputs),
                )
                if module in faulty
                else call
                for call in calls
            ]
            changed = changed or new != list(calls)
            turned[role][module] = new
    bound.habits.layouts = turned
    return changed


def _strided(axis: Any) -> Any:
    return axis if axis is None or not axis.several else evolve(axis, strided=True)
