"""The source `PerExample` at one checkpoint: its passes, and calls that are learned on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from attrs import define, field
from torch import Tensor, nn

from dattri_core import Block, Evaluator, InputError, Space, batch_size, take
from dattri_parts.sources.axes import EXAMPLES
from dattri_parts.sources.blocks import formed_stacks
from dattri_parts.sources.capture import Pass
from dattri_parts.sources.fallback import RepeatError
from dattri_parts.sources.finite import plain, require_finite
from dattri_parts.sources.habits import Habits, UnseenCallError, WrittenInputError
from dattri_parts.sources.mingled import Mingled
from dattri_parts.sources.plan import SourcePlan, suits
from dattri_parts.sources.resolve import CURE, layouts_in, paths_of
from dattri_parts.sources.verify import Mismatches, mismatches

Role = Literal["train", "test"]
Sink = Callable[[str, Block], None]


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
            except (WrittenInputError, RepeatError) as error:
                path = paths_of(self.evaluator.task.model)[error.module]
                kind = type(error.module).__name__
                if isinstance(error, RepeatError):
                    what_of = f"{kind} at {path!r} cannot be run for one example ({error})"
                else:
                    what_of = f"the input of {kind} at {path!r} is changed in place after it ran"
                raise InputError(f"per-example: {what_of}, unlike on the sample; {CURE}") from error

        require_finite(once, sink, self.evaluator.checkpoint, what)

    def _learn(self, batch: Any, role: Role, unseen: UnseenCallError) -> None:
        """Learn calls that the sample did not show, from the batch in which they are made.

        Of a batch without padding a model may make no mask. The rows of some of its examples are
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
        count = batch_size(batch)
        # Spread over the batch, since those in front may stand where a sort would put them.
        some = torch.linspace(0, count - 1, min(count, EXAMPLES)).long()
        rows: dict[str, Block] = {}

        def keep(name: str, block: Block) -> None:
            rows[name] = block.take(some)

        both = {m: tuple(dict.fromkeys([*known[m], *found[m]])) for m in known}
        self.habits.layouts = {**self.habits.layouts, role: both}
        right = False
        try:
            made = Pass(self.evaluator, self.plan, self.habits, role, count, keep)
            made.run(lambda model: self.evaluator.total_of(model, batch, role))
            places = [(at,) for at in range(len(some))]
            checked = (self.evaluator, self.space, rows, take(batch, some), role, places)
            right = not mismatches(*checked).wrong
        except RepeatError:
            raise unseen from None
        finally:  # also where memory runs out on the way
            if not right:
                self.habits.layouts = {**self.habits.layouts, role: known}
        if not right:
            raise unseen

    def _learnt(self, role: Role) -> Role:
        """Return the role whose habits hold: a test side without target is the train loss."""
        return role if self.evaluator.task.target is not None else "train"

    def mismatches(
        self, look: Mingled, roles: tuple[Role, ...], unseen: tuple[Role, ...] = ()
    ) -> Mismatches:
        """Return the parameters whose rows differ from autograd on examples in another order.

        Of roles unseen one example is compared: rows that were kept show whether examples mix, and
        not what takes part in the loss outside of the modules.
        """
        seen = Mismatches({})
        first: dict[str, Block] | None = None
        for role in roles:
            rows: dict[str, Block] = {}

            def keep(name: str, block: Block, rows: dict[str, Block] = rows) -> None:
                rows[name] = block.take(look.index)

            self.stream(look.batch, role, keep)
            if role == "train":
                first = look.first_rows(rows)
            places = look.places[:1] if role in unseen else look.places
            found = mismatches(self.evaluator, self.space, rows, look.batch, role, places)
            seen = seen.and_(found)
        self._first = first
        return seen
