"""Makes the worlds: real data, and models that were trained on it, the larger ones briefly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import worlds
from dattri_benchmarks import cifar, mnist, models, shakespeare
from torch import Tensor

MLP = (128, 64)
LR: tuple[int, ...] = ()
LENGTH = 64
"""Characters of a Shakespeare sequence."""


def mnist_world(
    path: Path, hidden: tuple[int, ...], n_train: int, n_test: int, standardised: bool = False
) -> None:
    """MNIST with a multi-layer perceptron, or logistic regression: 20 epochs of SGD.

    Pixels are between 0 and 1, or have mean 0 and variance 1 over the train set of 60,000.
    """
    sets = []
    for part, count in (("train", n_train), ("t10k", n_test)):
        images, labels = (values[:count] for values in mnist.read_mnist(part))
        inputs = images.reshape(count, -1).astype(np.float32) / 255
        if standardised:
            inputs = (inputs - 0.1307) / 0.3081
        sets.append((torch.from_numpy(inputs), torch.from_numpy(labels.astype(np.int64))))
    torch.manual_seed(0)
    widths = (784, *hidden, 10)
    world = worlds.World(models.mlp(*widths), "cross-entropy", *sets)
    rate = 0.01 if standardised else 0.1
    sgd = torch.optim.SGD(world.model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-3)
    _train(world, sgd, epochs=20, batch=100)
    worlds.save(path, world, "mlp", *widths)


def cifar_world(path: Path, n_train: int, n_test: int, width: int = 64) -> None:
    """CIFAR-2, cats and dogs, with ResNet-9 (4.8M parameters): three epochs of SGD."""
    sets = []
    for part, count in zip(cifar.read_cifar("cifar2"), (n_train, n_test), strict=True):
        images = part.images[:count].transpose(0, 3, 1, 2).astype(np.float32) / 255
        inputs = (torch.from_numpy(np.ascontiguousarray(images)) - 0.45) / 0.25
        sets.append((inputs, torch.from_numpy(part.labels[:count].astype(np.int64))))
    torch.manual_seed(0)
    world = worlds.World(models.resnet9(2, width), "cross-entropy", *sets)
    sgd = torch.optim.SGD(world.model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    _train(world, sgd, epochs=3, batch=50)
    worlds.save(path, world, "resnet9", 2, width)


def shakespeare_world(
    path: Path, n_train: int, n_test: int, width: int = 384, layers: int = 6, length: int = LENGTH
) -> None:
    """Shakespeare's characters with a transformer (6 x 384: 10.7M parameters): three epochs."""
    sets = []
    for codes, count in zip(shakespeare.read_sequences(length), (n_train, n_test), strict=True):
        tokens = torch.from_numpy(codes[:count].astype(np.int64))
        sets.append((tokens, tokens.clone()))
    torch.manual_seed(0)
    sizes = (65, length, layers, width, 6)
    world = worlds.World(models.nano_gpt(*sizes), "causal-lm", *sets)
    adam = torch.optim.AdamW(world.model.parameters(), lr=1e-3)
    _train(world, adam, epochs=3, batch=20)
    worlds.save(path, world, "nano_gpt", *sizes)


MAKERS: dict[str, Callable[..., None]] = {
    "mnist": mnist_world,
    "cifar2": cifar_world,
    "shakespeare": shakespeare_world,
}


def _train(world: worlds.World, optimizer: Any, epochs: int, batch: int) -> None:
    inputs, labels = world.train
    world.model.train()
    for _ in range(epochs):
        for start in range(0, len(inputs), batch):
            x, y = inputs[start : start + batch], labels[start : start + batch]
            optimizer.zero_grad()
            loss: Tensor = worlds.summed_loss(world, world.model(x), y)
            count = y.numel() if world.loss == "causal-lm" else len(y)
            (loss / count).backward()
            optimizer.step()
    world.model.eval()
