"""Rows of the margin: the number that a model decides by, instead of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from attrs import field, frozen
from dattri_parts.sources.per_example import PerExample
from torch import Tensor, nn

from dattri_core import (
    Block,
    BoundSource,
    Checkpoint,
    Evaluator,
    Loss,
    Source,
    Space,
    SpecError,
    Target,
    Task,
)

Role = Literal["train", "test"]
Sink = Callable[[str, Block], None]


@frozen
class Margin:
    """Rows -d f_b / d parameters of the margin f, and the residual -d loss_b / d f_b.

    For a label of probability p, f = log(p / (1 - p)), loss = log(1 + exp(-f)) and the residual is
    1 - p, so that residual times row is the gradient of the loss. For a sequence f is the sum over
    its tokens of log(p_t / (1 - p_t)) and the residual the mean of 1 - p_t; ignored tokens count
    nothing. Which margin it is, the loss says (`Loss.margin`): ``"cross-entropy"``,
    ``"causal-lm"`` and ``"token-cross-entropy"`` have one, and any other task gives
    ``dattri.Loss(..., margin=..., residual=...)``. Rows carry the sign of the loss: minus the
    margin is what less of is better.

    Test rows are of the target of the task; without one, of the margin, of which more is better.
    Curvatures made of products see minus the margin in place of the loss.

    Source: Park et al. 2023, TRAK: Attributing Model Behavior at Scale, section 3 (arXiv
    2303.14186).

    Args:
        source: Gives the gradients of parameters.
    """

    source: Source = field(factory=PerExample)

    @property
    def provides(self) -> frozenset[str]:
        """Return what the inner source provides, and the residual."""
        return self.source.provides | {"residual"}

    def bind(self, task: Task, checkpoint: Checkpoint, sample: Any) -> BoundMargin:
        """Bind the inner source to the task of the margin; the user's task stays as it is.

        Raises:
            SpecError: The loss has no margin, or the inner source gives no gradients.
            InputError: As the inner source.
        """
        loss = task.loss
        if not isinstance(loss, Loss) or loss.margin is None:
            raise SpecError(
                f"source 'margin': the loss {task.loss_name!r} has no margin; use the loss "
                "'cross-entropy', 'causal-lm' or 'token-cross-entropy', or give "
                "dattri.Loss(forward=..., criterion=..., "
                "margin=lambda outputs, batch: [B] numbers, log(p / (1 - p)) or the like)"
            )
        minus = _Minus(loss)
        target = task.named_target or Target(minus.margin, higher_is_better=True, name="margin")
        inner = self.source.bind(task.with_(loss=minus, target=target), checkpoint, sample)
        evaluator = getattr(inner, "evaluator", None)
        if not isinstance(evaluator, Evaluator) or not inner.space.covers_parameters:
            raise SpecError(
                f"source 'margin': the rows of {type(self.source).__name__} are not gradients of "
                "parameters; use the source 'per-example' or 'functional' inside of it"
            )
        return BoundMargin(inner, evaluator, loss)


@frozen(eq=False)
class BoundMargin:
    """`Margin` at one checkpoint.

    Args:
        inner: The inner source, bound to the task of the margin.
        evaluator: Of the inner source.
        loss: That of the user's task.
    """

    inner: BoundSource
    evaluator: Evaluator
    loss: Loss

    @property
    def space(self) -> Space:
        """Return the space of the inner source."""
        return self.inner.space

    def stream(self, batch: Any, role: Role, sink: Sink) -> Mapping[str, Tensor]:
        """Hand the blocks of a batch to the sink; the residual costs one more forward pass."""
        aux = self.inner.stream(batch, role, sink)
        with self.evaluator.session(), torch.no_grad():
            residual = self.evaluator.call(lambda model: _residual(self.loss, model, batch))
        return {**aux, "residual": residual}


@frozen
class _Minus:
    """Minus the margin, as a loss ``(model, batch) -> [B]``: its outputs are not known apart.

    A GGN or drawn labels are those of a negative log likelihood, which it is not.
    """

    loss: Loss

    @property
    def __name__(self) -> str:
        return f"minus the margin of {self.loss.name}"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return -self.margin(model, batch)

    def margin(self, model: nn.Module, batch: Any) -> Tensor:
        assert self.loss.margin is not None
        return self.loss.margin(self.loss.forward(model, batch), batch)


def _residual(loss: Loss, model: nn.Module, batch: Any) -> Tensor:
    outputs = loss.forward(model, batch)
    if loss.residual is not None:
        return loss.residual(outputs, batch)
    assert loss.margin is not None
    return (-loss.margin(outputs, batch)).sigmoid()
