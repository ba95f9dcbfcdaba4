"""Multi-layer perceptrons, logistic regression among them."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a multi-layer perceptron on flattened inputs: linear layers, activations between.

    ``mlp(784, 128, 64, 10)`` is the MNIST network of 109,386 parameters; ``mlp(784, 10)`` is
    logistic regression, of 7,850.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        if number:
            layers.append(activation())
        layers.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*layers)


def mnist_mlp() -> nn.Sequential:
    """Return the MNIST network 784-128-64-10, 109,386 parameters."""
    return mlp(784, 128, 64, 10)


def mnist_logistic_regression() -> nn.Sequential:
    """Return multinomial logistic regression on MNIST, 7,850 parameters."""
    return mlp(784, 10)
