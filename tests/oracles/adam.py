"""Adam at work, and the steps that single examples cause: by real steps of torch's optimisers."""

import copy

import torch
from torch import nn

from dattri_core import take
from dattri_core.laws.oracles import place
from dattri_core.laws.worlds import seeded


class Tied(nn.Module):
    """Tokens through a tied embedding, a grouped convolution, a norm and a weight of no rule."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        seen = torch.tanh(self.conv(self.embedding(tokens).mT).mT)
        return self.head(self.norm(self.gain * torch.tanh(self.hidden(seen)))).mean(1)


def tied():
    return seeded(Tied)


def sequences(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(6, (count, 5), generator=generator),
        torch.randint(6, (count,), generator=generator),
    )


def mean_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def groups_of(model, **options):
    """Return two groups as a trainer makes them, matrices and the rest, with betas of their own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "betas": (0.8, 0.95), **options},
        {"params": [p for p in trained if p.dim() <= 1], "betas": (0.7, 0.9), "eps": 1e-6},
    ]


def trained(model, batch, kind=torch.optim.AdamW, steps=3, rate=0.01, size=4):
    """Return the model's optimiser after some steps on parts of a batch."""
    optimizer = kind(groups_of(model), lr=rate, weight_decay=0.1)
    go_on(model, optimizer, batch, steps, size)
    return optimizer


def go_on(model, optimizer, batch, steps=3, size=4):
    for at in range(steps):
        optimizer.zero_grad()
        mean_loss(model, take(batch, slice(at * size, (at + 1) * size))).backward()
        optimizer.step()
    optimizer.zero_grad()


def steps_of(model, optimizer, batch, loss=mean_loss):
    """Return theta - theta' of a step at rate 1 on each example alone, ``[B, *shape]`` by name."""
    found = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    for b in range(len(batch[1])):
        alone, own = copy.deepcopy((model, optimizer))
        for group in own.param_groups:
            group.update(lr=1.0, weight_decay=0.0)
        before = {name: p.detach().clone() for name, p in alone.named_parameters()}
        own.zero_grad()
        loss(alone, take(batch, slice(b, b + 1))).backward()
        own.step()
        for name, p in alone.named_parameters():
            if name in found:
                found[name].append(before[name] - p.detach())
    return {name: torch.stack(steps) for name, steps in found.items()}


def gradients_of(model, batch, loss=mean_loss):
    """Return the gradient of each example alone, ``[B, *shape]`` by name."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = [
        torch.autograd.grad(loss(model, take(batch, slice(b, b + 1))), list(weights.values()))
        for b in range(len(batch[1]))
    ]
    return {name: torch.stack([g[at] for g in found]).detach() for at, name in enumerate(weights)}


def laid_out(bound, by_name):
    """Return numbers by parameter as the rows of a source that wraps another, ``[B, d]``."""
    return place(bound.inner.space, by_name)


def flat(by_name):
    return torch.cat([values.flatten(1) for values in by_name.values()], 1)
