"""Toy worlds: small tasks in float64 whose every number a dense oracle can compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from dattri_core.adam_state import AdamState, ParameterMoments
from dattri_core.batch import Batch, map_tensors
from dattri_core.forward import forward_of
from dattri_core.losses import Loss
from dattri_core.shipped_losses import causal_lm, cross_entropy, squared_error
from dattri_core.task import Task

N_TRAIN, N_TEST = 9, 5
ROUNDING = 1e-14
"""Of weights around 1 that Newton's method has found."""


@frozen(eq=False)
class World:
    """A model, its loss and a few examples.

    Args:
        name: How reports call it.
        model: Makes the model, the same one every time, in float64 and eval mode.
        loss: Its train loss.
        train: ``N_TRAIN`` examples.
        test: ``N_TEST`` examples.
        convex: Whether the loss is convex in the parameters.
        rate: The L2 rate that the weights minimise the mean train loss with; None: no minimum.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Loss
    train: Batch
    test: Batch
    convex: bool = False
    rate: float | None = None

    def task(
        self,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Task:
        """Return a fresh task, its model on a device; options go to `Task`.

        Every checkpoint knows a state of Adam, for sources whose rows are made with it.
        """
        model = self.model().to(device, dtype)
        task = Task(model, options.pop("loss", self.loss), **options)
        state = adam_state(model)
        task.checkpoints = tuple(evolve(c, optimiser=state) for c in task.checkpoints)
        return task


def adam_state(model: nn.Module) -> AdamState:
    """Return moments that depend on names and shapes alone, the second ones well above zero."""
    moments: dict[str, ParameterMoments] = {}
    for position, (name, weight) in enumerate(model.named_parameters()):
        first = 0.02 * random(*weight.shape, seed=2000 + position)
        second = 0.05 + random(*weight.shape, seed=3000 + position).square()
        moments[name] = ParameterMoments(first, second, 4, (0.6, 0.9), 1e-8)
    return AdamState(moments)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return the batch with its floating point tensors in another dtype."""
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def random(*shape: int, seed: int) -> Tensor:
    """Return normal float64 numbers that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def integers(high: int, *shape: int, seed: int) -> Tensor:
    """Return integers below ``high`` that depend on the seed alone."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def seeded(build: Callable[[], nn.Module], scale: float = 0.5) -> nn.Module:
    """Return a model with weights that depend on their names alone; global state is untouched."""
    with torch.random.fork_rng(devices=[]):
        model = build().double()
    with torch.no_grad():
        for position, (name, weight) in enumerate(model.named_parameters()):
            noise = scale * random(*weight.shape, seed=1000 + position)
            weight.copy_(noise + (1.0 if name.endswith("norm.weight") else 0.0))
    return model.eval()


def regression() -> World:
    """Return least squares: the Hessian is the mean of (x, 1)(x, 1)^T whatever the weights."""
    return World(
        "regression",
        lambda: seeded(lambda: nn.Linear(3, 2)),
        squared_error,
        (random(N_TRAIN, 3, seed=1), random(N_TRAIN, 2, seed=2)),
        (random(N_TEST, 3, seed=3), random(N_TEST, 2, seed=4)),
        convex=True,
    )


def logistic(rate: float = 0.05) -> World:
    """Return softmax regression whose weights minimise mean loss + rate/2 |w|^2 to rounding."""
    train = _logistic_train()
    test = (random(N_TEST, 3, seed=13), integers(3, N_TEST, seed=14))
    fitted = _optimum(rate)

    def build() -> nn.Module:
        model = seeded(lambda: nn.Linear(3, 3))
        assert isinstance(model, nn.Linear)
        with torch.no_grad():
            model.weight.copy_(fitted[:, :3])
            model.bias.copy_(fitted[:, 3])
        return model

    return World("logistic", build, cross_entropy, train, test, convex=True, rate=rate)


def _logistic_train() -> tuple[Tensor, Tensor]:
    return random(N_TRAIN, 3, seed=11), integers(3, N_TRAIN, seed=12)


@functools.cache
def _optimum(rate: float) -> Tensor:
    """Return the weights of `logistic`, which is made anew for every law; never written to."""
    weights = torch.full((N_TRAIN,), 1 / N_TRAIN, dtype=torch.float64)
    return minimise_logistic(_logistic_train(), weights, rate)


def minimise_logistic(train: Batch, weights: Tensor, rate: float) -> Tensor:
    """Return [outputs, inputs + 1] that minimises sum_i weights_i loss_i + rate/2 |.|^2 by Newton.

    Args:
        train: Inputs ``[n, I]`` and labels ``[n]``.
        weights: Weight of each example, ``[n]``.
        rate: L2 rate, on the bias too.
    """
    inputs, labels = train
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    classes = int(labels.max()) + 1
    solution = torch.zeros(classes * inputs.shape[1], dtype=torch.float64)
    onehot = nn.functional.one_hot(labels, classes).double()
    for _ in range(40):
        p = (inputs @ solution.reshape(classes, -1).T).softmax(1)
        gradient = torch.einsum("n,no,ni->oi", weights, p - onehot, inputs).flatten()
        gradient = gradient + rate * solution
        curve = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        hessian = torch.einsum("n,nop,ni,nj->oipj", weights, curve, inputs, inputs)
        hessian = hessian.reshape(len(solution), len(solution))
        step = torch.linalg.solve(hessian + rate * torch.eye(len(solution)).double(), gradient)
        solution = solution - step
        if step.abs().max() < ROUNDING:
            break
    return solution.reshape(classes, -1)


class _Halves(nn.Module):
    """The sum of two linear layers, each of its part of the input: convex, in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(2, 3)
        self.right = nn.Linear(3, 3, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        answer: Tensor = self.left(inputs[:, :2]) + self.right(inputs[:, 2:])
        return answer


def halves() -> World:
    """Return softmax regression of two layers: its loss is convex, its rows have two blocks."""
    return World(
        "halves",
        lambda: seeded(_Halves),
        cross_entropy,
        (random(N_TRAIN, 5, seed=51), integers(3, N_TRAIN, seed=52)),
        (random(N_TEST, 5, seed=53), integers(3, N_TEST, seed=54)),
        convex=True,
    )


APART = 8
"""Train examples of `apart`."""


def apart() -> World:
    """Return two layers, one of which half of the examples see, the other one the other half.

    The weights are near 0, so that the traces of GGN, Fisher matrix and mean of g g^T are alike.
    """

    def inputs(count: int, seed: int) -> Tensor:
        signs = 2.0 * integers(2, count, 5, seed=seed).double() - 1
        signs[: count // 2, 2:] *= 0.2
        signs[count // 2 :, :2] *= 0.2
        return signs

    return World(
        "apart",
        lambda: seeded(_Halves, 0.1),
        cross_entropy,
        (inputs(APART, 71), integers(3, APART, seed=72)),
        (inputs(N_TEST, 73), integers(3, N_TEST, seed=74)),
        convex=True,
    )


class _Network(nn.Module):
    """Several kinds of module: a convolution, norms, dropout, a linear layer at one position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3, padding=1)
        self.group_norm = nn.GroupNorm(1, 3)
        self.hidden = nn.Linear(12, 4)
        self.layer_norm = nn.LayerNorm(4)
        self.dropout = nn.Dropout(0.4)  # off in eval mode, but for a source that masks it
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.group_norm(self.conv(inputs)))
        hidden = torch.tanh(self.layer_norm(self.hidden(hidden.flatten(1))))
        answer: Tensor = self.head(self.dropout(hidden))
        return answer


def network() -> World:
    """Return a small classifier with several kinds of module; its loss is not convex."""
    return World(
        "network",
        lambda: seeded(_Network),
        cross_entropy,
        (random(N_TRAIN, 2, 4, seed=21), integers(3, N_TRAIN, seed=22)),
        (random(N_TEST, 2, 4, seed=23), integers(3, N_TEST, seed=24)),
    )


class _LanguageModel(nn.Module):
    """Tokens in, logits out; position t sees the mean of the tokens up to t, so no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.mix = nn.Linear(3, 3)
        self.layer_norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 6, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        tokens = self.embedding(input_ids)
        steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device, dtype=tokens.dtype)
        seen = tokens.cumsum(1) / steps[:, None]
        answer: Tensor = self.head(self.layer_norm(tokens + torch.tanh(self.mix(seen))))
        return answer


def language() -> World:
    """Return a tiny language model on sequences of 4 tokens, some of them ignored by the loss."""

    def sequences(count: int, seed: int) -> dict[str, Tensor]:
        tokens = integers(6, count, 4, seed=seed)
        labels = tokens.clone()
        labels[::2, 3] = -100
        return {"input_ids": tokens, "labels": labels}

    return World(
        "language",
        lambda: seeded(_LanguageModel),
        causal_lm,
        sequences(N_TRAIN, 31),
        sequences(N_TEST, 32),
    )


def padded(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return sequences with so many further tokens, which mask and labels say are none."""

    def longer(values: Tensor, filler: int) -> Tensor:
        return nn.functional.pad(values, (0, count), value=filler)

    tokens, labels = batch["input_ids"], batch["labels"]
    mask = longer(torch.ones_like(tokens), 0)
    return {
        "input_ids": longer(tokens, 3),
        "labels": longer(labels, -100),
        "attention_mask": mask,
    }


class _Classifier(nn.Module):
    """Classifies a sequence by the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        answer: Tensor = self.head(self.embedding(tokens).mean(1))
        return answer


def sentences() -> World:
    """Return a small classifier of sequences of token ids, for methods that read tokens alone."""
    return World(
        "sentences",
        lambda: seeded(_Classifier),
        cross_entropy,
        (integers(7, N_TRAIN, 5, seed=41), integers(3, N_TRAIN, seed=42)),
        (integers(7, N_TEST, 5, seed=43), integers(3, N_TEST, seed=44)),
    )


def worlds() -> tuple[World, ...]:
    """Return every toy world."""
    return (regression(), logistic(), network(), language())


def scaled(loss: Loss, factor: float) -> Loss:
    """Return a loss times a factor, its outputs and criterion still apart."""
    return Loss(
        loss.forward, lambda outputs, batch: factor * loss.criterion(outputs, batch), loss.name
    )


def decayed(loss: Loss) -> Callable[[nn.Module, Batch], Tensor]:
    """Return a loss plus the squared weights, which no call of a module shows."""

    def values(model: nn.Module, batch: Batch) -> Tensor:
        decay = torch.stack([weight.square().sum() for weight in model.parameters()]).sum()
        return loss(model, batch) + decay

    return values


def first_logit(model: nn.Module, batch: Batch) -> Tensor:
    """Return one number per example that is no loss: the mean of the first output, ``[B]``."""
    outputs = forward_of(model, batch)
    return outputs[..., 0].reshape(len(outputs), -1).mean(1)
