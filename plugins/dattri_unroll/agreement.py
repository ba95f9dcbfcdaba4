"""Whether a recorded step is the step of gradient descent that it is taken for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dattri_core import Checkpoint, Evaluator, Examples, InputError, leaves, map_tensors

ROUNDING = 8
"""Units in the last place by which weights may differ besides the tolerance."""


def require_step(
    evaluator: Evaluator,
    after: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    batch: Tensor,
    train: Examples,
    tolerance: float,
    size: int,
) -> None:
    """Raise unless theta - eta (mean gradient of the batch + weight_decay theta) is theta'.

    Args:
        evaluator: At theta.
        after: The attributed parameters of theta', by name.
        checkpoint: Whose step it is.
        batch: Positions of its examples, ``[B]``.
        train: The train set.
        tolerance: Largest |theta' - expected| / |expected - theta| to accept.
        size: Examples at a time.

    Raises:
        InputError: The weights went elsewhere.
    """
    assert checkpoint.step is not None
    rate, decay = checkpoint.learning_rate or 0.0, checkpoint.step.weight_decay
    gradient = _mean_gradient(evaluator, batch, train, size)
    gap = move = scale = 0.0
    for name, theta in evaluator.selected.items():
        start = theta.double()
        expected = -rate * (gradient[name].double() + decay * start)
        got = after[name].double() - start
        gap += float((got - expected).square().sum())
        move += float(expected.square().sum())
        scale += float(start.square().sum())
    slack = ROUNDING * torch.finfo(evaluator.dtype).eps * scale**0.5
    if not gap**0.5 <= tolerance * move**0.5 + slack:
        raise InputError(
            f"dvemb: the step recorded at {checkpoint.name!r} is not that of gradient descent on "
            f"its batch of {len(batch)} examples: the weights end {gap**0.5:.3g} from where the "
            f"mean gradient of the task's loss leads, a step of {move**0.5:.3g}; the train set "
            "must be the one that was trained on, in its order, and the loss the one that was "
            "minimised, a mean over the batch, without clipping, dropout or batch statistics; "
            "where this is known, dattri.method('dvemb', tolerance=...) accepts it"
        )


def _mean_gradient(
    evaluator: Evaluator, batch: Tensor, train: Examples, size: int
) -> dict[str, Tensor]:
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
    return {name: value / len(batch) for name, value in total.items()}
