"""One pass over one batch: hooks catch inputs and output gradients, and blocks are made of them.

Only gradients with respect to activations are computed: no weight requires grad, so the first
module of interest starts the graph, and each block is made, handed over and freed as the backward
pass reaches its module. Inputs are kept as tensors that autograd saved, so that activation
checkpointing drops and recomputes them, and a later write into one is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import define, field
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from dattri_core import Block, Evaluator, InputError
from dattri_parts.sources.axes import CallLayout, Shape
from dattri_parts.sources.blocks import fold_calls, join_calls, turn, zero_block
from dattri_parts.sources.fallback import Fallback, ModuleCall
from dattri_parts.sources.habits import (
    Habits,
    UnseenCallError,
    WrittenInputError,
    WrittenOutputError,
)
from dattri_parts.sources.nest import pull, push
from dattri_parts.sources.observe import CallShapes, removed
from dattri_parts.sources.plan import Site, SourcePlan
from dattri_parts.sources.resolve import CURE

Sink = Callable[[str, Block], None]


class _Save(torch.autograd.Function):
    """Saves tensors as a backward pass would, under whatever hooks on saved tensors there are."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing depends on this output")


@define(eq=False)
class _Record:
    """One call whose gradient is awaited."""

    site: Site
    layout: CallLayout | None
    token: Tensor | None
    skeleton: Any

    def release(self) -> Sequence[Tensor]:
        """Return the inputs, and keep them no longer: the graph outlives this record's use."""
        assert self.token is not None
        node: Any = self.token.grad_fn
        try:
            saved: Sequence[Tensor] = node.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error) and "in-place" not in str(error):
                raise
            raise WrittenInputError(self.site.module) from error
        finally:
            self.token = None  # not before: torch 2.11 lets go of what a node saved with its output
        return saved


@define(eq=False)
class Pass:
    """The forward and backward pass of one batch; use once."""

    evaluator: Evaluator
    plan: SourcePlan
    habits: Habits
    role: Any  # whose habits hold
    count: int
    sink: Sink
    hold: bool = False  # keep all blocks to the end, while it is not known which calls report
    reports: dict[nn.Module, int] = field(factory=dict, init=False)
    calls: dict[nn.Module, int] = field(factory=dict, init=False)
    silent: dict[nn.Module, int] = field(factory=dict, init=False)  # calls without gradients
    _expected: dict[str, int] = field(factory=dict, init=False)
    _parts: dict[str, list[Block]] = field(factory=dict, init=False)
    _received: dict[str, int] = field(factory=dict, init=False)
    _given: set[str] = field(factory=set, init=False)
    _entered: dict[nn.Module, list[tuple[tuple[Shape, ...], Tensor | None, Any]]] = field(
        factory=dict, init=False
    )
    _ordinals: dict[nn.Module, int] = field(factory=dict, init=False)
    _backward: bool = field(default=False, init=False)
    _paused: bool = field(default=False, init=False)
    _anchor: Tensor = field(init=False)
    _views: list[tuple[nn.Module, Tensor, int]] = field(factory=list, init=False)

    def run(self, objective: Callable[[nn.Module], Tensor]) -> None:
        """Stream the blocks of a batch to the sink.

        Args:
            objective: The model, its weights swapped, to the sum over the batch of what is
                differentiated; it calls the modules as the loss or target of the role does.
        """
        self._anchor = torch.zeros((), device=self.evaluator.device, requires_grad=True)

        def both_ways(model: nn.Module) -> None:
            total = objective(model)
            self._expect()
            self._require_unwritten()
            self._backward = True
            if total.requires_grad:
                # Inside the call: recomputed activations see this checkpoint's weights too.
                torch.autograd.backward(total)

        with (
            self.evaluator.session(),
            torch.inference_mode(False),
            torch.enable_grad(),
            removed([]) as handles,
        ):
            for site in self.plan.sites:
                before, after = self._hooks(site)
                handles.append(site.module.register_forward_pre_hook(before, with_kwargs=True))
                # First of all forward hooks: a user's hook may change the output.
                handles.append(
                    site.module.register_forward_hook(after, prepend=True, with_kwargs=True)
                )
            for module in self.habits.starters:
                handles.append(module.register_forward_hook(_start))
            try:
                self.evaluator.call(both_ways)
            finally:
                self._paused = True
            self._require_unwritten()
            self._finish()

    # --- forward --------------------------------------------------------------------------------
    def _hooks(self, site: Site) -> tuple[Any, Any]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._paused:
                tensors, skeleton = pull((args, kwargs))
                shapes = tuple(tuple(t.shape) for t in tensors)
                token = self._save(site, tensors) if torch.is_grad_enabled() else None
                self._entered.setdefault(module, []).append((shapes, token, skeleton))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if self._paused:
                return None
            # The last one entered: a recomputation that was cut short leaves some behind.
            given, token, skeleton = self._entered[module].pop()
            outputs, form = pull(output)
            layout = self._layout(site, CallShapes.of(given, outputs))
            if layout is not None:
                outputs = layout.spread(outputs, self.count)
            if token is None or not torch.is_grad_enabled():
                self.silent[module] = self.silent.get(module, 0) + 1
                return push(form, outputs)
            if not self._backward:
                self.calls[module] = self.calls.get(module, 0) + 1
            outputs = self._apart(module, _started(outputs))
            self._await(_Record(site, layout, token, skeleton), outputs)
            return push(form, outputs)

        return before, after

    def _save(self, site: Site, tensors: Sequence[Tensor]) -> Tensor:
        kept = [t.detach() for t in (tensors if site.rule is None else tensors[:1])]
        if site.module in self.habits.copied:
            kept = [t.clone() for t in kept]
        token: Tensor = _Save.apply(self._anchor, *kept)  # type: ignore[no-untyped-call]
        return token

    def _apart(self, module: nn.Module, outputs: list[Tensor]) -> list[Tensor]:
        """Return outputs whose gradients are those of what comes after the module, and no more.

        Of several outputs one may be made from another inside. And a hook on a view is lost when
        the view is written into, since autograd then makes its history anew.
        """
        if sum(t.requires_grad for t in outputs) > 1 or module in self.habits.detached:
            return [t.clone() if t.requires_grad else t for t in outputs]
        if self.hold:
            views = [t for t in outputs if t.requires_grad and t._is_view()]
            self._views.extend((module, t, t._version) for t in views)
        return outputs

    def _layout(self, site: Site, shapes: CallShapes) -> CallLayout | None:
        module = site.module
        known = self.habits.layouts[self.role].get(module, ())
        if not self._backward:
            at = self._ordinals.get(module, 0)
            self._ordinals[module] = at + 1
            if at < len(known) and _fits(known[at], shapes, self.count):
                return known[at]
        # A recomputed call has no place in the order, and neither has one more than in the sample.
        alike = list(dict.fromkeys(one for one in known if _fits(one, shapes, self.count)))
        if len(alike) == 1:
            return alike[0]
        if self._backward and not any(one.is_spread for one in alike):
            return None  # needed only if a gradient comes back to the call that is made again
        told = (
            f"per-example: {type(module).__name__} at {site.path!r} is called with shapes "
            f"{list(shapes.inputs)} -> {list(shapes.outputs)} for {self.count} examples, which "
            f"{'fit two calls' if alike else 'are unlike every call'} seen on the sample, so the "
            f"axis that counts examples is not known; {CURE}"
        )
        raise InputError(told) if self._backward else UnseenCallError(module, told)

    def _await(self, record: _Record, tensors: Sequence[Tensor]) -> None:
        live = [t for t in tensors if t.requires_grad]
        if not live:
            return
        if len(live) == 1 == len(tensors):
            hook: Any = live[0].register_hook  # torch leaves it untyped
            hook(lambda grad: self._report(record, [grad]))
            return
        places = [at for at, t in enumerate(tensors) if t.requires_grad]

        def together(grads: Sequence[Tensor | None]) -> None:
            given: list[Tensor | None] = [None] * len(tensors)
            for at, grad in zip(places, grads, strict=True):
                given[at] = grad
            self._report(record, given)

        register_multi_grad_hook(live, together)

    def _expect(self) -> None:
        for site in self.plan.sites:
            for piece in site.pieces:
                before = self._expected.get(piece.block, 0)
                self._expected[piece.block] = before + self._expected_of(site.module)

    def _require_unwritten(self) -> None:
        views, self._views = self._views, []
        for module, tensor, version in views:
            if tensor._version != version:
                raise WrittenOutputError(module)

    # --- backward -------------------------------------------------------------------------------
    def _report(self, record: _Record, grads: Sequence[Tensor | None]) -> None:
        if not self._backward or self._paused:  # a gradient that the model itself takes
            return
        site, layout = record.site, record.layout
        if layout is None:
            raise InputError(
                f"per-example: the calls of {type(site.module).__name__} at {site.path!r} have "
                "examples on different axes, and a reentrant checkpoint makes them again in "
                f"another order; give the checkpoint use_reentrant=False, or {CURE}"
            )
        inputs = record.release()
        self.reports[site.module] = self.reports.get(site.module, 0) + 1
        self._paused = True  # a fallback runs the module again
        try:
            with torch.no_grad():
                found = self._rows(site, layout, record.skeleton, inputs, grads)
        finally:
            self._paused = False
        for piece, block in zip(site.pieces, found, strict=True):
            target = self.plan.space[piece.block]
            self._parts.setdefault(piece.block, []).append(turn(block, piece.own, target))
            self._received[piece.block] = self._received.get(piece.block, 0) + 1
        del found, block
        for name in dict.fromkeys(piece.block for piece in site.pieces):
            if not self.hold and self._received[name] >= self._expected[name]:
                self._give(name)

    def _rows(
        self,
        site: Site,
        layout: CallLayout,
        skeleton: Any,
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> list[Block]:
        module, rule = site.module, site.rule
        if rule is None:
            fallback = self.habits.fallbacks.setdefault(module, Fallback(module))
            trained = {k: v for piece in site.pieces for k, v in piece.trained.items()}
            call = ModuleCall(inputs, skeleton, grads, layout, self.count)
            rows = fallback.rows(call, trained)
            return [rows[next(iter(piece.trained))] for piece in site.pieces]
        grad = grads[0]
        assert grad is not None
        spread = layout.spreads[0]
        if spread is not None:
            grad = spread.lead(grad)
            first = spread.lead_inputs(inputs[0], self.count)
        else:
            input_axis, output_axis = layout.inputs[0], layout.outputs[0]
            assert input_axis is not None
            assert output_axis is not None
            grad = output_axis.lead(grad, self.count)
            first = input_axis.lead(inputs[0], self.count)
        return [
            fold_calls(rule.rows(module, piece.trained, first, grad), self.count)
            for piece in site.pieces
        ]

    def _give(self, name: str) -> None:
        if name in self._given:
            raise InputError(
                f"per-example: more gradients arrived for {name!r} than modules were called in the "
                f"forward pass; {CURE}"
            )
        self._given.add(name)
        self.sink(name, join_calls(self._parts.pop(name)))

    def _finish(self) -> None:
        for site in self.plan.sites:
            missing = self.missing(site.module)
            if missing and site.module in self.habits.complete.get(self.role, ()):
                raise InputError(
                    f"per-example: {missing} calls of {type(site.module).__name__} at "
                    f"{site.path!r} gave no gradient, though all of its calls on the sample did; "
                    "its output is written into in place, or not used, for some batches only; "
                    f"{CURE}"
                )
        for spec in self.plan.space:
            if spec.name in self._given:
                continue
            if spec.name not in self._parts:
                weight = self.evaluator.selected[spec.parameters[0].parameter]
                zero = zero_block(spec, self.count, weight.dtype, weight.device)
                self._parts[spec.name] = [zero]
            self._give(spec.name)

    def unheard(self, module: nn.Module) -> bool:
        """Return whether calls without gradients have not all been made again with them."""
        silent = self.silent.get(module, 0)
        return 0 < silent > self.reports.get(module, 0) - self.calls.get(module, 0)

    def missing(self, module: nn.Module) -> int:
        """Return how many calls of the forward pass no gradient came back to."""
        return self._expected_of(module) - self.reports.get(module, 0)

    def _expected_of(self, module: nn.Module) -> int:
        again = module in self.habits.recomputed[self.role]
        return self.calls.get(module, 0) + (self.silent.get(module, 0) if again else 0)


def _start(module: nn.Module, args: Any, output: Any) -> Any:
    """Begin a graph at a module that has no rows of its own: a forward hook."""
    if not torch.is_grad_enabled():
        return None
    tensors, form = pull(output)
    return push(form, _started(tensors))


def _started(tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors that require gradients; a graph starts at those that did not."""
    # A clone, since a leaf must not be written into, as ReLU(inplace=True) does.
    return [
        t if t.requires_grad or not t.is_floating_point() else t.detach().requires_grad_().clone()
        for t in tensors
    ]


def _fits(layout: CallLayout, shapes: CallShapes, count: int) -> bool:
    if layout.signature != shapes.signature:
        return False
    pairs = [
        *zip(layout.inputs, shapes.inputs, strict=True),
        *zip(layout.outputs, shapes.outputs, strict=True),
    ]
    return all(axis is None or axis.fits(shape, count) for axis, shape in pairs)
