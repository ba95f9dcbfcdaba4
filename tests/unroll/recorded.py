"""Runs that are recorded while torch trains, and the same runs for the oracles."""

from __future__ import annotations

import torch
from dattri_unroll import record
from oracles.unrolled import Descent
from torch import nn

from dattri_core import cross_entropy, squared_error

N = 12
LOSSES = {
    "squared-error": lambda outputs, labels: squared_error.criterion(outputs, (None, labels)),
    "cross-entropy": lambda outputs, labels: cross_entropy.criterion(outputs, (None, labels)),
}


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear():
    """Return a quadratic problem: a linear model, squared errors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
    train = draw(N, 3, seed=1), draw(N, 2, seed=2)
    test = draw(4, 3, seed=3), draw(4, 2, seed=4)
    return model, "squared-error", train, test


def network():
    """Return a network with one hidden layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    labels = torch.Generator().manual_seed(5)
    train = draw(N, 3, seed=1), torch.randint(3, (N,), generator=labels)
    test = draw(4, 3, seed=3), torch.randint(3, (4,), generator=labels)
    return model, "cross-entropy", train, test


def schedule(steps=9, size=4, seed=0):
    """Return batches of three epochs, and learning rates that change at every step."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(N, generator=generator) for _ in range(-(-steps * size // N))]
    batches = torch.cat(orders).split(size)[:steps]
    return [b.tolist() for b in batches], [0.2 / (1 + 0.3 * s) for s in range(steps)]


def train_step(model, optimizer, loss, data, indices):
    optimizer.zero_grad()
    loss(model(data[0][indices]), data[1][indices]).mean().backward()


def groups_of(model, decay, shares=None):
    """Return groups of parameters with a weight decay and rate of their own, where given so."""
    if not isinstance(decay, dict) and shares is None:
        return [{"params": list(model.parameters()), "weight_decay": decay, "share": 1.0}]
    names = [name for name, _ in model.named_parameters()]
    decay = decay if isinstance(decay, dict) else dict.fromkeys(names, decay)
    shares = shares or dict.fromkeys(names, 1.0)
    return [
        {"params": [p], "weight_decay": decay[n], "share": shares[n]}
        for n, p in model.named_parameters()
    ]


def run_recorded(
    world,
    folder,
    *,
    batches=None,
    rates=None,
    decay=0.0,
    adam=None,
    clip=None,
    scale=1.0,
    shares=None,
    **momentum,
):
    """Train the model and record it; return the run as the oracles take it."""
    model, loss, train, _ = world
    if batches is None:
        batches, rates = schedule()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    groups = groups_of(model, decay, shares)
    if adam is None:
        optimizer = torch.optim.SGD(groups, lr=1.0, **momentum)
    else:
        kind = torch.optim.AdamW if adam[3] else torch.optim.Adam
        optimizer = kind(groups, lr=1.0, betas=adam[:2], eps=adam[2])
    with record(model, optimizer, folder, clip=clip) as run:
        for step, (indices, rate) in enumerate(zip(batches, rates, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            train_step(
                model, optimizer, lambda *given: scale * LOSSES[loss](*given), train, indices
            )
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            run.step(indices, epoch=step * len(indices) // N, scale=scale)
            optimizer.step()
    model.load_state_dict(start)  # the oracle begins where the run did
    return Descent(
        model,
        LOSSES[loss],
        train,
        batches,
        rates,
        decay,
        adam=adam,
        clip=clip,
        scale=scale,
        shares=shares,
        **momentum,
    )
