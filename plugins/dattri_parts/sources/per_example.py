"""Per-example gradients by hooks: one forward and one backward pass for the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor, nn

from dattri_core import (
    Block,
    Checkpoint,
    Evaluator,
    InputError,
    Space,
    Task,
    batch_size,
    take,
)
from dattri_parts.sources.axes import EXAMPLES
from dattri_parts.sources.blocks import formed_stacks
from dattri_parts.sources.capture import Pass
from dattri_parts.sources.finite import plain, require_finite
from dattri_parts.sources.habits import Habits, UnseenCallError, WrittenInputError
from dattri_parts.sources.plan import SourcePlan, make_plan, suits
from dattri_parts.sources.rehearse import rehearse
from dattri_parts.sources.resolve import CURE, layouts_in, paths_of, resolve, slots_of
from dattri_parts.sources.verify import mismatches

Role = Literal["train", "test"]
Sink = Callable[[str, Block], None]


@frozen
class PerExample:
    """Rows g_b = d loss_b / d parameters, caught at each module in one pass over the batch.

    A layer's gradient is kept as its factors (`OuterBlock`) where it has them: for a linear layer
    dL_b/dW = sum_t e_bt x_bt^T with x its input and e the gradient at its output. Blocks stream in
    the order of the backward pass, so that one layer's rows are alive at a time. Which module kinds
    have a rule is a matter of registration (`LayerRule`); any other is differentiated by
    ``torch.func``, that module alone.

    Source: Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799; Rochette et
    al., arXiv 1912.06015 (convolutions).
    """

    provides: ClassVar[frozenset[str]] = frozenset()

    def bind(self, task: Task, checkpoint: Checkpoint, sample: Any) -> BoundPerExample:
        """Learn the model's calls on a few examples, and check their rows against autograd.

        Args:
            task: The task.
            checkpoint: One of its checkpoints.
            sample: Up to three examples, on the device of the task.

        Raises:
            InputError: The loss is unfit (see `Evaluator`), or a parameter takes part in it in a
                way that no module shows; the parameters are named.
        """
        with torch.inference_mode(False):
            return _bind(task, checkpoint, plain(sample))

    def move(self, bound: BoundPerExample, checkpoint: Checkpoint) -> BoundPerExample:
        """Return the source at other weights of the model; its modules' calls are known."""
        return BoundPerExample(bound.evaluator.moved_to(checkpoint), bound.plan, bound.habits)


@define(eq=False)
class BoundPerExample:
    """`PerExample` at one checkpoint."""

    evaluator: Evaluator
    plan: SourcePlan
    habits: Habits
    _first: dict[str, Block] | None = field(default=None, init=False)

    @property
    def space(self) -> Space:
        """Return the blocks, in the order of the model's parameters."""
        return self.plan.space

    def stream(self, batch: Any, role: Role, sink: Sink) -> Mapping[str, Tensor]:
        """Hand the blocks of a batch to the sink, last module first.

        Raises:
            InputError: The modules are called unlike on the sample.
            NumericsError: A gradient is not finite; checkpoint, block and example are named.
        """
        self._first = None
        batch = plain(batch)
        learnt = self._learnt(role)
        self._run(
            lambda model: self.evaluator.total_of(model, batch, learnt),
            (batch, learnt),
            sink if role == "train" else formed_stacks(sink),
            f"rows of role {role!r}",
        )
        return {}

    def first_rows(self) -> dict[str, Block] | None:
        """Return the blocks of the train rows that were compared at bind, once."""
        first, self._first = self._first, None
        return first

    def pull(self, batch: Any, cotangent: Callable[[Tensor], Tensor], sink: Sink) -> None:
        """Hand the blocks of the rows J_b^T u_b to the sink, J_b the Jacobian of the outputs.

        Args:
            batch: Examples.
            cotangent: Outputs of the loss's forward pass ``[B, ...]`` to u of the same shape, which
                is held constant.
            sink: Takes each block once, last module first.

        Raises:
            InputError: The loss is not split in outputs and criterion, and as in `stream`.
            NumericsError: A gradient is not finite; checkpoint, block and example are named.
        """
        batch = plain(batch)
        self._run(
            lambda model: self.evaluator.pulled_of(model, batch, cotangent),
            (batch, "train"),
            sink,
            "rows of outputs",
        )

    def _run(
        self,
        objective: Callable[[nn.Module], Tensor],
        given: tuple[Any, Role],
        sink: Sink,
        what: str,
    ) -> None:
        batch, role = given

        def run(watched: Sink) -> None:
            made = Pass(self.evaluator, self.plan, self.habits, role, batch_size(batch), watched)
            made.run(objective)

        def once(watched: Sink) -> None:
            try:
                try:
                    run(watched)
                except UnseenCallError as error:  # nothing was handed over yet
                    self._learn(batch, role, error)
                    run(watched)
            except WrittenInputError as error:
                path = paths_of(self.evaluator.task.model)[error.module]
                raise InputError(
                    f"per-example: the input of {type(error.module).__name__} at {path!r} is "
                    f"changed in place after the module ran, which it was not on the sample; {CURE}"
                ) from error

        require_finite(once, sink, self.evaluator.checkpoint, what)

    def _learn(self, batch: Any, role: Role, unseen: UnseenCallError) -> None:
        """Learn calls that the sample did not show, from the batch in which they are made.

        Of a batch without padding a model may make no mask. The rows of its first examples are
        compared with autograd, as those of the sample were.

        Raises:
            UnseenCallError: The calls do not tell examples apart, or the rows are wrong.
        """
        sites = {site.module: site for site in self.plan.sites}
        found = layouts_in(self.evaluator, set(sites), batch, self.habits.refused, role)
        known = self.habits.layouts[role]
        if found is None or not all(
            site.rule is None or suits(site.rule, call)
            for module, site in sites.items()
            for call in found[module]
        ):
            raise unseen
        self.habits.layouts = {
            **self.habits.layouts,
            role: {m: tuple(dict.fromkeys([*known[m], *found[m]])) for m in known},
        }
        size = min(batch_size(batch), EXAMPLES)
        first, rows = torch.arange(size), dict[str, Block]()

        def keep(name: str, block: Block) -> None:
            rows[name] = block.take(first)

        made = Pass(self.evaluator, self.plan, self.habits, role, batch_size(batch), keep)
        made.run(lambda model: self.evaluator.total_of(model, batch, role))
        if mismatches(self.evaluator, self.space, rows, take(batch, first), role, size):
            self.habits.layouts = {**self.habits.layouts, role: known}
            raise unseen

    def _learnt(self, role: Role) -> Role:
        """Return the role whose habits hold: a test side without target is the train loss."""
        return role if self.evaluator.task.target is not None else "train"

    def mismatches(self, sample: Any, examples: int, roles: tuple[Role, ...]) -> dict[str, float]:
        """Return the parameters whose rows differ from autograd on a sample, and by how much."""
        wrong: dict[str, float] = {}
        first: dict[str, Block] | None = None
        for role in roles:
            rows: dict[str, Block] = {}
            self.stream(sample, role, rows.__setitem__)
            if role == "train":
                first = rows
            found = mismatches(self.evaluator, self.space, rows, sample, role, examples)
            wrong.update({k: max(v, wrong.get(k, 0.0)) for k, v in found.items()})
        self._first = first
        return wrong


def _bind(task: Task, checkpoint: Checkpoint, sample: Any) -> BoundPerExample:
    evaluator = Evaluator(task, checkpoint, sample)
    size = min(batch_size(sample), EXAMPLES)
    trio = take(sample, torch.arange(EXAMPLES) % size)
    slots = slots_of(task.model, evaluator.selected)
    roles: tuple[Role, ...] = ("train",) if task.target is None else ("train", "test")
    refused: set[nn.Module] = set()
    while True:
        resolved = resolve(evaluator, slots, trio, refused, roles)
        habits = Habits(resolved.layouts, refused=refused)
        bound = BoundPerExample(evaluator, make_plan(evaluator, resolved), habits)
        for role in roles:
            rehearse(evaluator, bound.plan, bound.habits, trio, role)
        wrong = bound.mismatches(trio, size, roles)
        if wrong and _try_strided(bound, set(wrong)):
            wrong = bound.mismatches(trio, size, roles)
        misled = _shared_sites(bound, set(wrong)) - refused
        if not misled:
            break
        refused |= misled  # a shared output, repeated or not, does not tell whose gradient is whose
    if wrong:
        worst = ", ".join(f"{name!r} (by {off:.1e})" for name, off in list(wrong.items())[:6])
        raise InputError(
            f"per-example: the rows of {worst} differ from autograd on the first examples; the "
            "parameter takes part in the loss outside of its module's call (weight decay in the "
            "loss, a weight used directly), or its module mixes examples; "
            f"{CURE}, or leave the parameter out with parameters='!{next(iter(wrong))}'"
        )
    return bound


def _shared_sites(bound: BoundPerExample, wrong: set[str]) -> set[nn.Module]:
    """Return the modules at fault that have an output which examples share, repeated or not."""
    shared = {
        module
        for layouts in bound.habits.layouts.values()
        for module, calls in layouts.items()
        if any(call.is_spread or call.shared for call in calls)
    }
    return {site.module for site in bound.plan.sites if site.parameters & wrong} & shared


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
