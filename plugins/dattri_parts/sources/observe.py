"""Looking on while the model runs: which modules are called, with which shapes, in which order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, frozen
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dattri_core import Evaluator, batch_size
from dattri_parts.sources.axes import (
    Axis,
    CallLayout,
    Shape,
    Spread,
    UnclearAxisError,
    learn_axis,
)
from dattri_parts.sources.nest import pull, push

Spreads = Mapping[tuple[nn.Module, int], Spread]


@frozen
class CallShapes:
    """The shapes of one call of a module; only floating point outputs can have a gradient."""

    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    floating: tuple[bool, ...]

    @staticmethod
    def of(inputs: Iterable[Shape], outputs: Sequence[Tensor]) -> CallShapes:
        """Return the shapes of one call."""
        shapes = tuple(tuple(t.shape) for t in outputs)
        return CallShapes(tuple(inputs), shapes, tuple(t.is_floating_point() for t in outputs))

    @property
    def signature(self) -> tuple[int, ...]:
        """Return the numbers of axes, by which calls of another shape are recognised."""
        return (*(len(s) for s in self.inputs), -1, *(len(s) for s in self.outputs))


@define(eq=False)
class Observation:
    """What one forward pass showed."""

    calls: dict[nn.Module, list[CallShapes]]
    order: list[tuple[nn.Module, int]]
    total: Tensor


@contextmanager
def removed(handles: list[RemovableHandle]) -> Iterator[list[RemovableHandle]]:
    """Remove hooks however the block ends."""
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def observe(
    evaluator: Evaluator, modules: Iterable[nn.Module], batch: Any, role: Any, spreads: Spreads
) -> Observation:
    """Run the loss or target once without gradients and note the calls of the modules."""
    calls: dict[nn.Module, list[CallShapes]] = {}
    order: list[tuple[nn.Module, int]] = []
    count = batch_size(batch)

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        made = calls.setdefault(module, [])
        tensors, skeleton = pull(output)
        given = [tuple(t.shape) for t in pull((args, kwargs))[0]]
        made.append(CallShapes.of(given, tensors))
        order.append((module, len(made) - 1))
        spread = spreads.get(order[-1])
        return output if spread is None else push(skeleton, [spread.repeat(tensors[0], count)])

    def run(model: nn.Module) -> Tensor:
        total: Tensor = evaluator.total_of(model, batch, role)
        return total

    with evaluator.session(), torch.no_grad(), removed([]) as handles:
        for module in modules:
            handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        total = evaluator.call(run)
    return Observation(calls, order, total)


def layouts_of(
    seen: Sequence[Observation], module: nn.Module, spreads: Spreads
) -> list[CallLayout] | None:
    """Return the layout of each call of a module, or None if the shapes leave an axis unclear.

    Args:
        seen: What was observed at the small and at the large batch size.
        module: The module; as many calls at both sizes, or it is unclear.
        spreads: How shared outputs were repeated while looking on.
    """
    small, large = (observation.calls.get(module, []) for observation in seen)
    if len(small) != len(large):
        return None
    try:
        return [
            CallLayout(
                _axes(one.inputs, two.inputs),
                _axes(one.outputs, two.outputs),
                one.signature,
                spreads.get((module, at)),
            )
            for at, (one, two) in enumerate(zip(small, large, strict=True))
        ]
    except UnclearAxisError:
        return None


def is_shared(layout: CallLayout, shapes: CallShapes) -> bool:
    """Return whether a call gives one tensor that all examples share, and not yet spread."""
    return layout.spread is None and layout.outputs == (None,) and shapes.floating == (True,)


def _axes(small: tuple[Shape, ...], large: tuple[Shape, ...]) -> tuple[Axis | None, ...]:
    if len(small) != len(large):
        raise UnclearAxisError
    return tuple(learn_axis(one, two) for one, two in zip(small, large, strict=True))
