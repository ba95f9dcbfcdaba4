"""What goes into a pass, plain batches, and what comes out, rows watched for non-finite numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from dattri_core import Block, Checkpoint, NumericsError, OneHot, OuterBlock, map_tensors

Sink = Callable[[str, Block], None]


def plain(batch: Any) -> Any:
    """Return a batch of tensors that take no part in autograd and that autograd can save."""
    with torch.inference_mode(False):
        return map_tensors(lambda t: t.clone() if t.is_inference() else t.detach(), batch)


@define(eq=False)
class FiniteSink:
    """Passes blocks on, and keeps one number of each that is finite when all of the block is."""

    sink: Sink
    sums: list[Tensor] = field(factory=list)

    def __call__(self, name: str, block: Block) -> None:
        """Hand a block on."""
        self.sums.extend(values.detach().sum(dtype=_wide(values)) for values in _held(block))
        self.sink(name, block)

    def is_finite(self) -> bool:
        """Return whether every sum is finite; the one place that waits for the device."""
        return not self.sums or bool(torch.isfinite(torch.stack(self.sums)).all())


def require_finite(
    stream: Callable[[Sink], Any], sink: Sink, checkpoint: Checkpoint, what: str
) -> None:
    """Run ``stream(sink)`` and raise `NumericsError` if a block is not finite.

    Only then the batch is run once more, to name block and example.
    """
    watched = FiniteSink(sink)
    stream(watched)
    if watched.is_finite():
        return
    found: list[str] = []

    def look(name: str, block: Block) -> None:
        bad = torch.zeros(len(block), dtype=torch.bool)
        for values in _held(block):
            bad |= ~torch.isfinite(values).flatten(1).all(1).cpu()
        if bad.any():
            found.append(f"block {name!r}, examples {bad.nonzero().flatten().tolist()[:8]}")

    stream(look)
    if found:  # a sum may overflow where no number of the block does
        raise NumericsError(
            f"{what}: gradients are not finite at checkpoint {checkpoint.name!r}: "
            f"{'; '.join(found[:4])} of the batch; look for a diverged checkpoint, a log or "
            "division by zero in the loss, or numbers that overflow half precision"
        )


def _held(block: Block) -> list[Tensor]:
    if not isinstance(block, OuterBlock):
        return [block.dense().values]
    inputs = block.own_inputs
    return [block.outputs] if isinstance(inputs, OneHot) else [block.outputs, inputs]


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
