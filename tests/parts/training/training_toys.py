"""Small data and models to train again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from dattri_parts.training import ModelRetraining, Optimum, Recipe
from torch import Tensor, nn

import dattri_core as dattri

N, M, WIDTH, CLASSES = 40, 9, 6, 3


def classes(n: int = N, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, WIDTH, generator=random, dtype=torch.float64)
    noise = torch.randn(n, CLASSES, generator=random, dtype=torch.float64)
    return inputs.to(dtype), (2 * inputs[:, :CLASSES] + noise).argmax(1)


def numbers(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, WIDTH, generator=random, dtype=torch.float64)
    return inputs, inputs.sum(1) + torch.randn(n, generator=random, dtype=torch.float64)


def sequences(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 5, (n, 7), generator=random)
    labels = tokens.clone()
    labels[::3, 4:] = -100
    return tokens, labels


def tagged(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens, labels = sequences(n, seed)
    return tokens, torch.where(labels < 0, labels, (tokens + 2) % 5)


class NextToken(nn.Module):
    """A causal language model of one position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)))


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    hidden = (nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.Tanh())
    return nn.Sequential(*hidden, nn.Linear(8, CLASSES)).to(dtype)


def logistic() -> nn.Module:
    return nn.Linear(WIDTH, CLASSES)


def retraining(
    build: Callable[[], nn.Module],
    recipe: Recipe | Optimum,
    data: Callable[..., Any] = classes,
    loss: Any = "cross-entropy",
    targets: tuple[str, ...] = ("loss",),
    **options: Any,
) -> ModelRetraining:
    test = data(M, seed=1)
    settings: dict[str, Any] = {"train_data": data(), "test_data": test, "about": {}, **options}
    return ModelRetraining(build, recipe, loss, targets=targets, **settings)


def everything(n: int = N, seed: int = 0) -> dattri.Counterfactual:
    return dattri.Counterfactual(np.ones(n, dtype=bool), seed)


def difference(one: Any, other: Any) -> float:
    assert list(one) == list(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)
