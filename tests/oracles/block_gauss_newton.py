"""Influence with the Gauss-Newton matrix of each layer, by dense algebra on formed rows."""

from __future__ import annotations

import torch
from torch import nn

import dattri_core as dattri
from dattri_core import Rows, Task
from dattri_core.problem import collect


def rows_of(method, task, batch):
    """Return the train rows of a batch, formed."""
    source = method.source.bind(task, task.checkpoints[0], dattri.take(batch, slice(0, 3)))
    index = torch.arange(len(batch[1]))
    return collect(source, batch, index, "train", torch.device("cpu"))


def layer_by_layer(train: Rows, test: Rows, relative: float):
    """Return sum over blocks of <k_i, (mean k k^T + relative mean eigenvalue)^-1 k_j>."""
    total = torch.zeros(len(train), len(test), dtype=torch.float64)
    for name in train.space.names:
        g, h = (rows.blocks[name].flat() for rows in (train, test))
        moment = g.T @ g / len(g)
        damping = relative * moment.trace() / len(moment)
        eye = torch.eye(len(moment), dtype=torch.float64)
        total += g @ torch.linalg.solve(moment + damping * eye, h.T)
    return total


class Normed(nn.Module):
    """Two linear layers, a norm between them, and an embedding before."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.last(torch.tanh(self.norm(self.first(self.words(tokens)).mean(1))))


def normed_world():
    torch.manual_seed(3)
    task = Task(Normed().double())
    return task, *((torch.randint(7, (n, 5)), torch.randint(3, (n,))) for n in (20, 6))
