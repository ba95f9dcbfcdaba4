"""Losses and targets: what is differentiated, one number per example.

A loss is a plain function ``loss(model, batch) -> [B]``, a `Loss` whose outputs and criterion are
known apart (a GGN needs that), or a function of parameters marked with `functional`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor, nn

from dattri_core.batch import Batch
from dattri_core.criteria import (
    identity_factor,
    log_odds,
    normal_sample,
    softmax_factor,
    softmax_sample,
)
from dattri_core.errors import InputError, nearest

LABEL_KEYS = ("labels", "label")
IGNORED = -100
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
    raise _unlabelled(batch)


def _unlabelled(batch: Batch) -> InputError:
    return InputError(
        f"labels: a {type(batch).__name__} has no labels; give data as (inputs, ..., labels) or a "
        "dict with 'labels', or a loss that needs none"
    )


def forward_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's outputs on a batch: everything but the labels is passed on.

    A mapping is passed by keyword, a tuple by position; of a structured answer ``.logits`` is
    taken, else its first item.
    """
    if isinstance(batch, Mapping):
        answer = _by_keyword(model, {k: v for k, v in batch.items() if k not in LABEL_KEYS})
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        answer = model(*batch[:-1])
    else:
        raise _unlabelled(batch)
    return _tensor_of(answer)


def _by_keyword(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    try:
        return model(**inputs)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise InputError(
            f"model: a batch that is a dict is passed by keyword, all but "
            f"{' and '.join(LABEL_KEYS)}, and {error}; name the keys after the arguments of "
            "forward, and the labels 'labels', or give a loss that calls the model itself: "
            "dattri.Loss(forward=..., criterion=...)"
        ) from error


def _tensor_of(answer: Any) -> Tensor:
    if isinstance(answer, Tensor):
        return answer
    if hasattr(answer, "logits"):
        return _tensor_of(answer.logits)
    if isinstance(answer, Mapping) and "logits" in answer:
        return _tensor_of(answer["logits"])
    if isinstance(answer, (tuple, list)) and answer:
        return _tensor_of(answer[0])
    raise InputError(f"model output: a {type(answer).__name__} is neither a tensor nor has .logits")


# --- cross entropy ------------------------------------------------------------------------------
def _cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels_of(batch), reduction="none")


def _cross_entropy_weight(outputs: Tensor, batch: Batch) -> Tensor:
    """Return w_b of C_b = w_b (diag(p) - p p^T): 0 for an ignored label, the sum of soft labels."""
    labels = labels_of(batch)
    weight = labels.sum(1) if labels.is_floating_point() else labels != IGNORED
    return weight.to(outputs.device)


def _cross_entropy_sample(outputs: Tensor, batch: Batch, draw: Draw) -> Tensor:
    return softmax_sample(outputs, _cross_entropy_weight(outputs, batch), draw())


def _cross_entropy_factor(outputs: Tensor, batch: Batch) -> Tensor:
    return softmax_factor(outputs, _cross_entropy_weight(outputs, batch))


def _label_margin(outputs: Tensor, batch: Batch) -> Tensor:
    """Return log(p / (1 - p)) of the label, ``[B]``; 0 for an ignored one."""
    labels = labels_of(batch)
    if labels.is_floating_point():
        raise InputError(
            f"margin of the loss 'cross-entropy': the labels are {labels.dtype} of shape "
            f"{tuple(labels.shape)}, shares of the classes; log(p / (1 - p)) is of one class: give "
            "integer labels, or dattri.Loss(..., margin=..., residual=...)"
        )
    return _token_margins(outputs, labels)[0]


def _label_residual(outputs: Tensor, batch: Batch) -> Tensor:
    """Return 1 - p of the label, ``[B]``; 0 for an ignored one."""
    margins, known = _token_margins(outputs, labels_of(batch))
    return (-margins).sigmoid() * known


def _token_margins(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(p / (1 - p)) of each label, 0 for an ignored one, and which are not ignored."""
    known = (labels != IGNORED).to(logits.device)
    margins = log_odds(logits, labels.to(logits.device).masked_fill(~known, 0))
    return margins.masked_fill(~known, 0.0), known


# --- squared error ------------------------------------------------------------------------------
def _squared_error(outputs: Tensor, batch: Batch) -> Tensor:
    values = labels_of(batch).to(outputs.dtype).reshape(outputs.shape)
    return (outputs - values).square().flatten(1).sum(1) / 2


def _squared_error_sample(outputs: Tensor, batch: Batch, draw: Draw) -> Tensor:
    return normal_sample(outputs, draw(*outputs.shape[1:]))


def _squared_error_factor(outputs: Tensor, batch: Batch) -> Tensor:
    return identity_factor(outputs)


# --- next token ---------------------------------------------------------------------------------
def _next_token(outputs: Tensor, batch: Batch) -> Tensor:
    labels = labels_of(batch)[:, 1:]
    logits = outputs[:, :-1]
    tokens = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return tokens.reshape(labels.shape).sum(1)


def _next_token_weight(outputs: Tensor, batch: Batch) -> Tensor:
    return (labels_of(batch)[:, 1:] != IGNORED).to(outputs.device)


def _next_token_sample(outputs: Tensor, batch: Batch, draw: Draw) -> Tensor:
    weight = _next_token_weight(outputs, batch)
    slope = torch.zeros_like(outputs)
    slope[:, :-1] = softmax_sample(outputs[:, :-1], weight, draw(weight.shape[1]))
    return slope


def _next_token_factor(outputs: Tensor, batch: Batch) -> Tensor:
    """Return V - 1 columns for each position that predicts, 0 at the others."""
    each = softmax_factor(outputs[:, :-1], _next_token_weight(outputs, batch))
    columns, _, positions, _ = each.shape
    factor = outputs.new_zeros(positions, columns, *outputs.shape)
    for t in range(positions):
        factor[t, :, :, t] = each[:, :, t]
    return factor.flatten(0, 1)


def _next_token_margin(outputs: Tensor, batch: Batch) -> Tensor:
    """Return the sum over tokens of log(p_t / (1 - p_t)), ``[B]``; ignored ones count nothing."""
    return _token_margins(outputs[:, :-1], labels_of(batch)[:, 1:])[0].sum(1)


def _next_token_residual(outputs: Tensor, batch: Batch) -> Tensor:
    """Return the mean over tokens of 1 - p_t, ``[B]``; 0 for a sequence without any."""
    margins, known = _token_margins(outputs[:, :-1], labels_of(batch)[:, 1:])
    return ((-margins).sigmoid() * known).sum(1) / known.sum(1).clamp_min(1)


cross_entropy = Loss(
    forward_of,
    _cross_entropy,
    "cross-entropy",
    sample=_cross_entropy_sample,
    factor=_cross_entropy_factor,
    margin=_label_margin,
    residual=_label_residual,
)
"""Classification: ``-log p(label)``; batch ``(inputs..., labels)`` or a dict with ``labels``."""

squared_error = Loss(
    forward_of,
    _squared_error,
    "squared-error",
    sample=_squared_error_sample,
    factor=_squared_error_factor,
)
"""Regression: half the squared error, summed over the outputs of an example."""

causal_lm = Loss(
    forward_of,
    _next_token,
    "causal-lm",
    sample=_next_token_sample,
    factor=_next_token_factor,
    margin=_next_token_margin,
    residual=_next_token_residual,
)
"""Language modelling: ``-log p(next token)`` summed over a sequence; -100 is ignored."""


def true_logit(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logit of the true class, ``[B]``."""
    outputs = forward_of(model, batch)
    return outputs.gather(1, labels_of(batch).unsqueeze(1)).squeeze(1)


def true_margin(model: nn.Module, batch: Batch) -> Tensor:
    """Return log(p / (1 - p)) of the true class, ``[B]`` (TRAK, arXiv 2303.14186, section 3)."""
    return log_odds(forward_of(model, batch), labels_of(batch))


logit = Target(true_logit, higher_is_better=True, name="logit")
margin = Target(true_margin, higher_is_better=True, name="margin")

LOSSES: dict[str, Loss] = {loss.name: loss for loss in (cross_entropy, squared_error, causal_lm)}
TARGETS: dict[str, Target] = {target.name: target for target in (logit, margin)}
AnyLoss = Loss | FunctionalLoss | Callable[[nn.Module, Batch], Tensor]
Reduction = Literal["sum", "mean", "each"]


def as_loss(loss: str | AnyLoss) -> AnyLoss:
    """Return a shipped loss by name, or the loss itself."""
    if not isinstance(loss, str):
        if not callable(loss) and not isinstance(loss, FunctionalLoss):
            raise InputError(
                f"loss: {loss!r} is neither a name nor a function (model, batch) -> [B]"
            )
        if isinstance(loss, nn.modules.loss._Loss):
            raise InputError(
                f"loss: {type(loss).__name__} takes outputs and labels; give a function "
                "(model, batch) -> [B], or dattri.Loss(forward=..., criterion=...) with "
                "reduction='none'"
            )
        return loss
    if loss not in LOSSES:
        raise InputError(f"loss: no loss named {loss!r}; {nearest(loss, LOSSES)}")
    return LOSSES[loss]


def as_target(target: str | Target | None) -> Target | None:
    """Return a shipped target by name, the target itself, or None for the loss."""
    if target is None or target == "loss":
        return None
    if isinstance(target, Target):
        return target
    if isinstance(target, str) and target in TARGETS:
        return TARGETS[target]
    if isinstance(target, str):
        raise InputError(
            f"target: no target named {target!r}; {nearest(target, [*TARGETS, 'loss'])}"
        )
    raise InputError(
        f"target: got {target!r}; give a name or dattri.Target(function, higher_is_better=...)"
    )
