"""Losses and targets: what is differentiated, one number per example.

A loss is a plain function ``loss(model, batch) -> [B]``, a `Loss` whose outputs and criterion are
known apart (a GGN needs that), or a function of parameters marked with `functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from attrs import field, frozen
from torch import Tensor, nn

from dattri_core.batch import Batch
from dattri_core.errors import InputError

LABEL_KEYS = ("labels", "label")
Draw = Callable[..., Tensor]
"""``draw(*shape)``: numbers in [0, 1), ``[B, *shape]``, other ones at each call."""


@frozen
class Loss:
    """A loss split in two: loss_b = criterion(forward(model, batch), batch)_b.

    Args:
        forward: ``(model, batch) -> outputs [B, ...]``.
        criterion: ``(outputs, batch) -> [B]``, convex in the outputs for a GGN to be positive.
        name: How results call it.
        sample: ``(outputs, batch, draw) -> [B, ...]``: the slope of the criterion at the outputs
            for a label that is drawn from the model instead of the one in the batch. Rows of the
            Fisher information need it; its second moment is that Fisher.
        factor: ``(outputs, batch) -> [K, B, ...]``: columns f_k with sum_k f_k f_k^T = C_b, the
            Hessian of the criterion in the outputs of example b; a column that example b does not
            have is 0. Without it C_b is formed and decomposed (up to 1024 outputs an example).
        margin: ``(outputs, batch) -> [B]``: the number f of each example that the loss is a falling
            function of, such as log(p / (1 - p)) of the label. The source ``margin`` needs it.
        residual: ``(outputs, batch) -> [B]``: -d loss / d f, what is left to learn of each example.
            Without it 1 - p = 1 / (1 + exp(f)), that of ``loss = log(1 + exp(-f))``.
    """

    forward: Callable[[nn.Module, Batch], Tensor]
    criterion: Callable[[Tensor, Batch], Tensor]
    name: str = "loss"
    sample: Callable[[Tensor, Batch, Draw], Tensor] | None = field(default=None, kw_only=True)
    factor: Callable[[Tensor, Batch], Tensor] | None = field(default=None, kw_only=True)
    margin: Callable[[Tensor, Batch], Tensor] | None = field(default=None, kw_only=True)
    residual: Callable[[Tensor, Batch], Tensor] | None = field(default=None, kw_only=True)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each example, ``[B]``."""
        return self.criterion(self.forward(model, batch), batch)


@frozen
class FunctionalLoss:
    """A loss for ``torch.func``: ``function(parameters, batch) -> scalar``; see `functional`."""

    function: Callable[[dict[str, Tensor], Batch], Tensor]
    name: str = "functional"


@frozen
class Target:
    """What is attributed: a number per test example, and whether more of it is better.

    Args:
        function: ``(model, batch) -> [B]``.
        higher_is_better: True for a logit or a margin, False for a loss.
        name: How results call it.
    """

    function: Callable[[nn.Module, Batch], Tensor]
    higher_is_better: bool = field(kw_only=True)
    name: str = field(default="target", kw_only=True)


AnyLoss = Loss | FunctionalLoss | Callable[[nn.Module, Batch], Tensor]
Reduction = Literal["sum", "mean", "each"]


def functional(function: Callable[[dict[str, Tensor], Batch], Tensor]) -> FunctionalLoss:
    """Mark ``function(parameters, batch) -> scalar`` as a loss of parameters, as in ``torch.func``.

    Its reduction (sum or mean over examples) is detected; a loss that mixes examples is refused.
    """
    return FunctionalLoss(function, getattr(function, "__name__", "functional"))


def labels_of(batch: Batch) -> Tensor:
    """Return the labels of a batch: the last item of a tuple, or the key 'labels' or 'label'."""
    if isinstance(batch, Mapping):
        for key in LABEL_KEYS:
            if key in batch:
                return torch.as_tensor(batch[key])
        raise InputError(
            f"labels: the batch has keys {sorted(batch)}, and the labels are sought under "
            f"{' or '.join(map(repr, LABEL_KEYS))}; rename the key, or give a loss that knows "
            "yours: dattri.Loss(forward=..., criterion=...)"
        )
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return torch.as_tensor(batch[-1])
    raise unlabelled(batch)


def unlabelled(batch: Batch) -> InputError:
    """Return the error of a batch that has no labels."""
    return InputError(
        f"labels: a {type(batch).__name__} has no labels; give data as (inputs, ..., labels) or a "
        "dict with 'labels', or a loss that needs none"
    )
