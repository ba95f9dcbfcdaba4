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

Output = tuple[nn.Module, int, int]
"""A module, which of its calls, and which tensor of what that returned."""
Spreads = Mapping[Output, Spread]


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
    """What one forward pass showed.

    Args:
        count: Of examples.
        calls: Of each module.
        order: In which they were made.
        total: What the pass returned.
    """

    count: int
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
        ways = [spreads.get((*order[-1], at)) for at in range(len(tensors))]
        if not any(ways):
            return output
        pairs = zip(tensors, ways, strict=True)
        return push(skeleton, [t if way is None else way.repeat(t, count) for t, way in pairs])

    def run(model: nn.Module) -> Tensor:
        total: Tensor = evaluator.total_of(model, batch, role)
        return total

    with evaluator.session(), torch.no_grad(), removed([]) as handles:
        for module in modules:
            handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        total = evaluator.call(run)
    return Observation(count, calls, order, total)


def layouts_of(
    seen: Sequence[Observation], module: nn.Module, spreads: Spreads
) -> list[CallLayout] | None:
    """Return the layout of each call of a module, or None if the shapes leave an axis unclear.

    Args:
        seen: What was observed at one batch size and at another.
        module: The module; as many calls at both sizes, or it is unclear.
        spreads: How shared outputs were repeated while looking on.
    """
    small, large = (observation.calls.get(module, []) for observation in seen)
    if len(small) != len(large):
        return None
    counts = (seen[0].count, seen[1].count)
    try:
        return [
            _layout(
                one,
                two,
                counts,
                tuple(spreads.get((module, at, i)) for i in range(len(one.outputs))),
            )
            for at, (one, two) in enumerate(zip(small, large, strict=True))
        ]
    except UnclearAxisError:
        return None


def _layout(
    small: CallShapes,
    large: CallShapes,
    counts: tuple[int, int],
    spreads: tuple[Spread | None, ...],
) -> CallLayout:
    outputs = _axes(small.outputs, large.outputs, counts)
    each = enumerate(zip(outputs, spreads, small.floating, strict=True))
    return CallLayout(
        _axes(small.inputs, large.inputs, counts),
        outputs,
        small.signature,
        spreads,
        tuple(at for at, (axis, spread, own) in each if axis is None and spread is None and own),
    )


def _axes(
    small: tuple[Shape, ...], large: tuple[Shape, ...], counts: tuple[int, int]
) -> tuple[Axis | None, ...]:
    if len(small) != len(large):
        raise UnclearAxisError
    return tuple(learn_axis(one, two, counts) for one, two in zip(small, large, strict=True))
