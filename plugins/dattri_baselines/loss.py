"""The train loss as a row: what a score that asks for no test example can be made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import (
    Block,
    BlockSpec,
    BoundSource,
    Checkpoint,
    DenseBlock,
    Evaluator,
    Space,
    Task,
    take,
)

Role = Literal["train", "test"]
Sink = Callable[[str, Block], None]
TRIED = 3
"""Of the sample, examples that the loss is tried on."""
SPACE = Space((BlockSpec("loss", "dense", (1,)),))


@frozen
class LossValue:
    """Rows of one number, the loss of example b, which comes as the auxiliary ``loss`` too.

    Both roles have the train loss of their examples, whatever the target: no gradient is taken.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"loss"})
    expected_failures: ClassVar[Mapping[str, str]] = {
        "both-sides-are-one-source": "test rows are train losses, whatever the target"
    }

    def bind(self, task: Task, checkpoint: Checkpoint, sample: Any) -> BoundSource:
        """Load the checkpoint.

        Raises:
            InputError: The loss is unfit, see `Evaluator`.
        """
        return _BoundLossValue(Evaluator(task, checkpoint, take(sample, slice(0, TRIED))))


@frozen(eq=False)
class _BoundLossValue:
    evaluator: Evaluator
    space: ClassVar[Space] = SPACE

    def stream(self, batch: Any, role: Role, sink: Sink) -> Mapping[str, Tensor]:
        """Hand the losses over, ``[B, 1]``."""
        with self.evaluator.session(), torch.no_grad():
            losses = self.evaluator.per_example(None, batch, "train")
        sink("loss", DenseBlock(losses.unsqueeze(1)))
        return {"loss": losses}
