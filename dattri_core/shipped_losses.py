"""The losses and targets that have a name."""

from __future__ import annotations

import torch
from attrs import frozen
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
from dattri_core.forward import forward_of
from dattri_core.losses import AnyLoss, Draw, FunctionalLoss, Loss, Target, labels_of

IGNORED = -100


# --- cross entropy ------------------------------------------------------------------------------
def _cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    if outputs.dim() != 2:
        raise InputError(
            f"loss 'cross-entropy': outputs of shape {tuple(outputs.shape)}; expected [examples, "
            "classes]; for a label of each token use 'token-cross-entropy', and for that of the "
            "next one 'causal-lm'"
        )
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
    return _margins(outputs, labels)[0]


def _label_residual(outputs: Tensor, batch: Batch) -> Tensor:
    """Return 1 - p of the label, ``[B]``; 0 for an ignored one."""
    margins, known = _margins(outputs, labels_of(batch))
    return (-margins).sigmoid() * known


def _margins(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(p / (1 - p)) of each label, 0 for an ignored one, and which are not ignored."""
    known = (labels != IGNORED).to(logits.device)
    margins = log_odds(logits, labels.to(logits.device).masked_fill(~known, 0))
    return margins.masked_fill(~known, 0.0), known


# --- squared error ------------------------------------------------------------------------------
def _squared_error(outputs: Tensor, batch: Batch) -> Tensor:
    values = labels_of(batch).to(outputs.dtype).reshape(outputs.shape)
    return (outputs - values).square().reshape(len(outputs), -1).sum(1) / 2


def _squared_error_sample(outputs: Tensor, batch: Batch, draw: Draw) -> Tensor:
    return normal_sample(outputs, draw(*outputs.shape[1:]))


def _squared_error_factor(outputs: Tensor, batch: Batch) -> Tensor:
    return identity_factor(outputs)


# --- labels of tokens ---------------------------------------------------------------------------
@frozen
class _TokenLabels:
    """-log p summed over the labels of a sequence, of which -100 is ignored.

    Args:
        name: Of the loss.
        shift: How many places a label stands after the position whose outputs predict it.
    """

    name: str
    shift: int

    def loss(self) -> Loss:
        """Return the loss."""
        return Loss(
            forward_of,
            self.criterion,
            self.name,
            sample=self.sample,
            factor=self.factor,
            margin=self.margin,
            residual=self.residual,
        )

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        logits, labels = self._split(outputs, batch)
        tokens = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
        )
        return tokens.reshape(labels.shape).sum(1)

    def sample(self, outputs: Tensor, batch: Batch, draw: Draw) -> Tensor:
        logits, labels = self._split(outputs, batch)
        weight = (labels != IGNORED).to(outputs.device)
        slope = torch.zeros_like(outputs)
        slope[:, : logits.shape[1]] = softmax_sample(logits, weight, draw(weight.shape[1]))
        return slope

    def factor(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return V - 1 columns for each position that predicts, 0 at the others."""
        logits, labels = self._split(outputs, batch)
        each = softmax_factor(logits, (labels != IGNORED).to(outputs.device))
        columns, _, positions, _ = each.shape
        factor = outputs.new_zeros(positions, columns, *outputs.shape)
        for t in range(positions):
            factor[t, :, :, t] = each[:, :, t]
        return factor.flatten(0, 1)

    def margin(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the sum over tokens of log(p_t / (1 - p_t)), ``[B]``; ignored ones add nothing."""
        return _margins(*self._split(outputs, batch))[0].sum(1)

    def residual(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean over tokens of 1 - p_t, ``[B]``; 0 for a sequence without any."""
        margins, known = _margins(*self._split(outputs, batch))
        return ((-margins).sigmoid() * known).sum(1) / known.sum(1).clamp_min(1)

    def _split(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits that predict, and the label of each."""
        labels = labels_of(batch)
        if outputs.dim() != 3 or outputs.shape[:2] != labels.shape:
            raise InputError(
                f"loss {self.name!r}: outputs of shape {tuple(outputs.shape)} and labels of shape "
                f"{tuple(labels.shape)}; expected [examples, tokens, classes] and "
                f"[examples, tokens]; {_cure(outputs, labels)}"
            )
        return outputs[:, : outputs.shape[1] - self.shift], labels[:, self.shift :]


def _cure(outputs: Tensor, labels: Tensor) -> str:
    """Return what to do about outputs and labels of different tokens."""
    if outputs.dim() == 3 and labels.dim() == 2 and outputs.shape[1] > labels.shape[1]:
        more = outputs.shape[1] - labels.shape[1]
        return (
            f"if the model puts {more} virtual tokens before its inputs (prompt tuning), it has "
            f"outputs for them too: give {more} labels of -100 before those of each example"
        )
    return "for one label an example use 'cross-entropy'"


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

causal_lm = _TokenLabels("causal-lm", shift=1).loss()
"""Language modelling: ``-log p(next token)`` summed over a sequence; -100 is ignored."""

token_cross_entropy = _TokenLabels("token-cross-entropy", shift=0).loss()
"""A label for each token (masked words, tags, a decoder): ``-log p(label)`` summed over a sequence;
-100 is ignored."""


def true_logit(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logit of the true class, ``[B]``."""
    outputs = forward_of(model, batch)
    return outputs.gather(1, labels_of(batch).unsqueeze(1)).squeeze(1)


def true_margin(model: nn.Module, batch: Batch) -> Tensor:
    """Return log(p / (1 - p)) of the true class, ``[B]`` (TRAK, arXiv 2303.14186, section 3)."""
    return log_odds(forward_of(model, batch), labels_of(batch))


logit = Target(true_logit, higher_is_better=True, name="logit")
margin = Target(true_margin, higher_is_better=True, name="margin")

LOSSES: dict[str, Loss] = {
    loss.name: loss for loss in (cross_entropy, squared_error, causal_lm, token_cross_entropy)
}
TARGETS: dict[str, Target] = {target.name: target for target in (logit, margin)}


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
