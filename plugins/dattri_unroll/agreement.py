"""Whether a recorded step is the step of gradient descent that it is taken for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import (
    Checkpoint,
    Evaluator,
    Examples,
    InputError,
    TrainingStep,
    leaves,
    map_tensors,
)
from dattri_unroll.clipping import Clipping

ROUNDING = 8
"""Units in the last place by which weights may differ besides the tolerance."""


@frozen(eq=False)
class Previous:
    """The step before another one, from which the velocity is known.

    Args:
        evaluator: At its weights.
        checkpoint: Whose step it is.
        batch: Positions of its examples, ``[B]``.
    """

    evaluator: Evaluator
    checkpoint: Checkpoint
    batch: Tensor


def require_step(
    name: str,
    evaluator: Evaluator,
    after: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    batch: Tensor,
    train: Examples,
    tolerance: float,
    size: int,
    previous: Previous | None = None,
) -> None:
    """Raise unless theta - eta (mean gradient of the batch + weight_decay theta) is theta'.

    With momentum the velocity before the step is the one that the step before it shows, from the
    difference of its weights, and of its own gradient where it was Nesterov's. A step after one of
    learning rate 0, which shows nothing, is not looked at, nor are parameters whose rate it was.

    Args:
        name: Of the method, for errors.
        evaluator: At theta.
        after: The attributed parameters of theta', by name.
        checkpoint: Whose step it is.
        batch: Positions of its examples, ``[B]``.
        train: The train set.
        tolerance: Largest |theta' - expected| / |expected - theta| to accept.
        size: Examples at a time.
        previous: The step before, where there is one and it has momentum.

    Raises:
        InputError: The weights went elsewhere.
    """
    step, rate = checkpoint.step, checkpoint.learning_rate or 0.0
    assert step is not None
    if previous is not None and not previous.checkpoint.learning_rate:
        return
    descent = descent_of(evaluator, checkpoint, batch, train, size)
    velocity = None if previous is None else _velocity(previous, evaluator, train, size)
    gap = move = scale = 0.0
    for key, theta in evaluator.selected.items():
        start, direct = theta.double(), descent[key]
        turned = direct
        if velocity is not None:
            if key not in velocity:
                continue
            turned = step.momentum * velocity[key] + (1 - step.dampening) * direct
        if step.nesterov:
            turned = direct + step.momentum * turned
        expected = -rate * step.rate_of(key) * turned
        got = after[key].double() - start
        gap += float((got - expected).square().sum())
        move += float(expected.square().sum())
        scale += float(start.square().sum())
    slack = ROUNDING * torch.finfo(evaluator.dtype).eps * scale**0.5
    if previous is not None:  # the velocity is known as well as a difference of weights is
        slack *= 1 + rate / (previous.checkpoint.learning_rate or rate)
    if not gap**0.5 <= tolerance * move**0.5 + slack:
        raise InputError(
            f"{name}: the step recorded at {checkpoint.name!r} is not that of gradient descent on "
            f"its batch of {len(batch)} examples: the weights end {gap**0.5:.3g} from where the "
            f"mean gradient of the task's loss leads, a step of {move**0.5:.3g}; the train set "
            "must be the one that was trained on, in its order, the checkpoints those of every "
            "step, and the loss the one that was minimised, a mean over the batch (else "
            "record its scale), without dropout, batch statistics or clipping that was not "
            "recorded; "
            f"where this is known, dattri.method({name!r}, tolerance=...) accepts it"
        )


def descent_of(
    evaluator: Evaluator, checkpoint: Checkpoint, batch: Tensor, train: Examples, size: int
) -> dict[str, Tensor]:
    """Return d = scaled mean gradient of the batch, clipped, + weight_decay theta, in float64.

    Weight decay that is decoupled is no part of it.
    """
    step = checkpoint.step
    assert step is not None
    gradient = slope_of(evaluator, step, batch, train, size)
    share = 1.0 if step.clip is None else Clipping.of(gradient, step.clip).share
    apart = step.adam is not None and step.adam.decoupled
    return {
        name: share * gradient[name] + (0.0 if apart else step.decay_of(name)) * theta.double()
        for name, theta in evaluator.selected.items()
    }


def _velocity(previous: Previous, now: Evaluator, train: Examples, size: int) -> dict[str, Tensor]:
    """Return v after the step before, in float64, of parameters that it moved."""
    step, rate = previous.checkpoint.step, previous.checkpoint.learning_rate
    assert step is not None
    assert rate
    found = {
        name: (theta.double() - now.selected[name].double()) / (rate * step.rate_of(name))
        for name, theta in previous.evaluator.selected.items()
        if step.rate_of(name)
    }
    if not step.nesterov:
        return found
    descent = descent_of(previous.evaluator, previous.checkpoint, previous.batch, train, size)
    return {name: (value - descent[name]) / step.momentum for name, value in found.items()}


def slope_of(
    evaluator: Evaluator, step: TrainingStep, batch: Tensor, train: Examples, size: int
) -> dict[str, Tensor]:
    """Return g = scale times the mean gradient of the batch, by parameter in float64."""
    total: dict[str, Tensor] = {}
    for positions in torch.split(batch, size):
        nest = map_tensors(lambda t: t.to(evaluator.device), train.take(positions))
        variables = leaves(evaluator.selected)
        with evaluator.session(), torch.inference_mode(False), torch.enable_grad():
            value = evaluator.total(variables, nest, "train")
            found = torch.autograd.grad(
                value, list(variables.values()), allow_unused=True, materialize_grads=True
            )
        for name, part in zip(variables, found, strict=True):
            total[name] = total[name] + part if name in total else part
    return {name: value.double() * (step.scale / len(batch)) for name, value in total.items()}
