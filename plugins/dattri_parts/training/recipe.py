"""A recipe: how a model is trained by minibatch steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from dattri_core import InputError, nearest

OptimizerName = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "linear", "constant"]
Length = Literal["epochs", "steps"]
"""What trainings on parts of a train set have in common: their number of epochs, or of steps."""


def _epochs(epochs: Iterable[int]) -> tuple[int, ...]:
    return tuple(epochs)


@frozen
class Recipe:
    """Training from scratch by minibatch steps on the mean loss; each epoch is a new random order.

    The mean is over the examples of a minibatch; for ``"causal-lm"`` over the tokens that are
    predicted in it. With ``sgd`` the weight decay w is that of a penalty (w / 2) |theta|^2; with
    ``adamw`` it is apart from the gradient: theta falls by rate * w * theta at each step.

    Args:
        epochs: Passes over the train set.
        batch: Examples in a step; one that is larger than the train set is the whole of it.
        learning_rate: The largest; see ``schedule``.
        weight_decay: w. As an L2 penalty it bounds how negative the Hessian of the loss can be at
            a minimum, hence which damping makes it positive.
        momentum: Of ``sgd``; 0 for plain steps.
        optimizer: ``"sgd"`` or ``"adamw"`` (Loshchilov and Hutter 2019).
        betas: Of ``adamw``: decay of the means of the gradient and of its square.
        schedule: How the rate falls. ``"cosine"``: epoch by epoch along half a cosine to a
            hundredth; ``"linear"``: step by step, to 0 after the last one; ``"constant"``.
        warmup: Steps over which the rate of the schedule is reached: step t of them, from 1, has
            t / warmup of it.
        keep: The epochs after which the state is kept; the last one always is.
        clip: Largest norm of the gradient; a longer one is shortened to it.

    Raises:
        InputError: A number is out of range.
    """

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    optimizer: OptimizerName = "sgd"
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = "cosine"
    warmup: int = 0
    keep: tuple[int, ...] = field(default=(), converter=_epochs)
    clip: float | None = None

    def __attrs_post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("warmup", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise _wrong(name, value, f"an integer from {least}")
        _require("learning_rate", self.learning_rate, 0, math.inf, above=True)
        _require("weight_decay", self.weight_decay, 0, math.inf)
        _require("momentum", self.momentum, 0, 1)
        for beta in self.betas:
            _require("betas", beta, 0, 1)
        if self.clip is not None:
            _require("clip", self.clip, 0, math.inf, above=True)
        for name, choices in (("optimizer", OptimizerName), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(choices):
                raise InputError(
                    f"recipe: no {name} named {getattr(self, name)!r}; "
                    f"{nearest(str(getattr(self, name)), get_args(choices))}"
                )
        if self.optimizer == "adamw" and self.momentum:
            raise _wrong("momentum", self.momentum, "0: 'adamw' has betas in its place")
        check_kept(self.keep, self.epochs)

    def steps(self, examples: int) -> int:
        """Return the steps of an epoch over so many examples."""
        return math.ceil(examples / self.batch)

    def lasting(self, whole: int, examples: int) -> Recipe:
        """Return it with epochs enough, over so many examples, for its steps over ``whole`` ones.

        Epochs are rounded up; those that are kept lie at the same shares of the way.
        """
        epochs = math.ceil(self.epochs * self.steps(whole) / self.steps(examples))
        keep = tuple(math.ceil(epoch * epochs / self.epochs) for epoch in self.keep)
        return evolve(self, epochs=epochs, keep=keep)

    def rate(self, step: int, per_epoch: int) -> float:
        """Return the learning rate of a step, counted from 0, where an epoch has ``per_epoch``."""
        rate = self.learning_rate
        if self.schedule == "cosine":
            turn = torch.tensor(torch.pi * (step // per_epoch) / self.epochs, dtype=torch.float64)
            rate = rate * (0.01 + 0.99 * (1 + torch.cos(turn).item()) / 2)
        elif self.schedule == "linear":
            rate = rate * (1 - step / (self.epochs * per_epoch))
        return rate * (step + 1) / self.warmup if step < self.warmup else rate

    def optimizer_of(
        self, parameters: Iterable[Tensor], fused: bool | None = None
    ) -> torch.optim.Optimizer:
        """Return the optimiser; `rate` sets its rate before each step.

        Args:
            parameters: To train.
            fused: One pass over all numbers in place of one for each operation.
        """
        common: dict[str, Any] = {
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "fused": fused,
        }
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, betas=self.betas, **common)
        return torch.optim.SGD(parameters, momentum=self.momentum, **common)


def check_kept(keep: tuple[int, ...], epochs: int) -> None:
    """Refuse epochs to keep that there are none of."""
    wrong = [epoch for epoch in keep if not 1 <= epoch <= epochs]
    if wrong:
        raise _wrong("keep", keep, f"epochs from 1 to {epochs}")


def _require(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    fits = isinstance(value, (int, float)) and low <= value < high and not (above and value == low)
    if not fits:
        limit = f"above {low}" if above else f"from {low}"
        raise _wrong(name, value, f"a number {limit}" + ("" if high == math.inf else " to below 1"))


def _wrong(name: str, value: Any, expected: str) -> InputError:
    return InputError(f"recipe: {name} is {value!r}, expected {expected}")
