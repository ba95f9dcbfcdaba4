"""Outcomes: what is measured of a trained model, one number per test example."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from dattri_core import InputError, Loss, labels_of, nearest, squared_error
from dattri_parts.training.objective import IGNORED, SHIFTS, is_shipped

HIGHER_IS_BETTER = {"loss": False, "margin": True, "logit": True, "correct": True}
"""``loss``: of an example. ``margin``: log(p / (1 - p)) of the label. ``logit``: of the label.
``correct``: 1 where the label is the most likely class. Where tokens have labels all of them are
summed over these."""


def measured(names: Iterable[str]) -> dict[str, bool]:
    """Return for each named target whether more of it is better.

    Raises:
        InputError: A name is unknown or given twice, or there is none.
    """
    given = (names,) if isinstance(names, str) else tuple(names)
    if not given:
        raise InputError(f"retraining: no targets; give some of {sorted(HIGHER_IS_BETTER)}")
    for name in given:
        if name not in HIGHER_IS_BETTER:
            raise InputError(
                f"retraining: no target named {name!r}; {nearest(str(name), HIGHER_IS_BETTER)}"
            )
    if len(set(given)) < len(given):
        raise InputError(f"retraining: a target is given twice in {given}")
    return {name: HIGHER_IS_BETTER[name] for name in given}


def check_targets(targets: Iterable[str], loss: Loss) -> None:
    """Refuse targets that a loss does not have.

    Raises:
        InputError: A regression is asked for a class, or a loss of one's own for what it lacks.
    """
    if not is_shipped(loss):
        has = {"loss"} | ({"margin"} if loss.margin is not None else set())
        lacks = sorted(set(targets) - has)
        if lacks:
            raise InputError(
                f"retraining: the targets {lacks} are not known of the loss {loss.name!r}, which "
                f"has {sorted(has)}; give a dattri.Loss with a margin, or a Retraining of your own"
            )
        return
    classes = [target for target in targets if target != "loss"]
    if classes and loss.name == squared_error.name:
        raise InputError(
            f"retraining: the targets {classes} are of a class label, and the loss {loss.name!r} "
            "has none; its target is 'loss'"
        )


def outcomes_of(
    loss: Loss, targets: Iterable[str], model: Callable[..., Any], batch: Any
) -> dict[str, Tensor]:
    """Return each target on a batch, ``[B]`` in float64.

    Outputs are taken as the model gives them and measured in float64, so that a margin is exact
    where p rounds to 0 or 1.
    """
    outputs = loss.forward(model, batch).double()  # type: ignore[arg-type]
    return {target: _measures(loss, target, outputs, batch) for target in targets}


def _measures(loss: Loss, target: str, outputs: Tensor, batch: Any) -> Tensor:
    if target == "loss":
        return loss.criterion(outputs, batch)
    if target == "margin":
        assert loss.margin is not None  # `check_targets` refused it
        return loss.margin(outputs, batch).double()
    labels = labels_of(batch).to(outputs.device)
    shift = SHIFTS.get(loss.name, 0)
    if shift:
        outputs, labels = outputs[:, :-shift], labels[:, shift:]
    known = labels != IGNORED
    picked = labels.masked_fill(~known, 0)
    if target == "logit":
        values = outputs.gather(-1, picked.unsqueeze(-1)).squeeze(-1)
    else:
        values = (outputs.argmax(-1) == picked).double()
    return (values * known).reshape(len(values), -1).sum(1)
