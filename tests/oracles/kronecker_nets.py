"""Small float64 networks with every kind of layer that has Kronecker factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import dattri_core as dattri
from dattri_core import Task

N = 24  # more than any layer has inputs, so that factors are not singular
WORDS, LENGTH = 7, 5


def seeded(build: Any, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = build().double().eval()
    return model


def numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(classes: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> tuple[Task, Any]:
    model = seeded(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))
    )
    return Task(model), (numbers(N, 5, seed=1), labels(3, N, seed=2))


class ConvNet(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=min(2, groups))
        self.second = nn.Conv2d(4, 4, 2, dilation=2, bias=False, groups=groups)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        answer: Tensor = self.head(hidden.flatten(1))
        return answer


def conv(groups: int = 1) -> tuple[Task, Any]:
    model = seeded(lambda: ConvNet(groups))
    return Task(model), (numbers(N, 2, 7, 6, seed=3), labels(3, N, seed=4))


class LanguageModel(nn.Module):
    """Token t sees the mean of the tokens up to t; the mixing layer is used twice."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 3)
        self.mix = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        tokens = self.embedding(input_ids)
        steps = torch.arange(1, tokens.shape[1] + 1, dtype=tokens.dtype)
        hidden = torch.tanh(self.mix(tokens.cumsum(1) / steps[:, None]))
        answer: Tensor = self.head(self.norm(tokens + torch.tanh(self.mix(hidden))))
        return answer


def language(tied: bool = False) -> tuple[Task, Any]:
    """Return a language model; the last labels of every third sequence are ignored."""
    model = seeded(lambda: LanguageModel(tied))
    ids = labels(WORDS, N, LENGTH, seed=5)
    answers = ids.clone()
    answers[::3, 3:] = -100
    return Task(model, loss=dattri.causal_lm), {"input_ids": ids, "labels": answers}


NETS = {"mlp": mlp, "conv": conv, "language": language}
LAYERS = {
    "mlp": ("0", "3"),
    "conv": ("first", "second", "head"),
    "language": ("embedding", "mix", "head"),
}
