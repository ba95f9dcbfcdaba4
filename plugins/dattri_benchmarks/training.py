"""Training a small classifier: plain stochastic gradient descent, the same numbers every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from attrs import frozen
from torch import Tensor, nn

StateDict = dict[str, Tensor]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@frozen(eq=False)
class Run:
    """A finished training run: the model, and its state after some of the epochs.

    ``learning_rates[c]`` is the rate of the steps just before ``states[c]`` was taken.
    """

    model: nn.Module
    epochs: tuple[int, ...]
    states: tuple[StateDict, ...]
    learning_rates: tuple[float, ...]


@frozen
class Recipe:
    """How to train: minibatch SGD on the mean cross-entropy plus (weight_decay / 2) |theta|^2.

    Args:
        epochs: Passes over the train set.
        batch: Examples in a step.
        learning_rate: At first; it falls along half a cosine to a hundredth.
        weight_decay: Of the L2 penalty. It bounds how negative the Hessian of the cross-entropy can
            be at a minimum, hence which damping makes it positive.
        momentum: 0 for plain steps.
        keep: The epochs after which the state is kept; the last one always is.
    """

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    momentum: float
    keep: tuple[int, ...]

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        wave = torch.cos(torch.tensor(torch.pi * epoch / self.epochs, dtype=torch.float64)).item()
        return self.learning_rate * (0.01 + 0.99 * (1 + wave) / 2)

    def train(
        self, build: Callable[[], nn.Module], inputs: Tensor, labels: Tensor, seed: int
    ) -> Run:
        """Return the run of a new model on ``inputs [n, ...]``, ``labels [n]``.

        The initial weights and the order of examples come from the seed alone. One thread: steps of
        a small network are too short to share, and sums then come in the same order everywhere.
        """
        with _one_thread():
            return self._train(build, inputs, labels, seed)

    def _train(
        self, build: Callable[[], nn.Module], inputs: Tensor, labels: Tensor, seed: int
    ) -> Run:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build()
        order = torch.Generator().manual_seed(seed + 1)
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        kept: list[tuple[int, StateDict, float]] = []
        model.train()
        for epoch in range(self.epochs):
            rate = self.rate(epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for index in torch.split(torch.randperm(len(labels), generator=order), self.batch):
                optimizer.zero_grad(set_to_none=True)
                loss = nn.functional.cross_entropy(model(inputs[index]), labels[index])
                torch.autograd.backward(loss)
                optimizer.step()
            if epoch + 1 in self.keep or epoch + 1 == self.epochs:
                state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                kept.append((epoch + 1, state, rate))
        model.eval()
        epochs, states, rates = zip(*kept, strict=True)
        return Run(model, epochs, states, rates)
