"""Oracle of In-Run Data Shapley: the game of each step, its values by all subsets of its players.

A player of a step is an example in the batch of that step, or of an earlier one whose gradient the
velocity still holds, or weight decay. The worth of a set of players is what a Taylor expansion says
the loss falls by when they alone move the weights.
"""

from __future__ import annotations

from itertools import product
from math import factorial

import torch
from torch import Tensor
from torch.func import hessian, jacrev

from oracles.unrolled import Descent

DECAY = -1


def moves(run: Descent) -> list[tuple[Tensor, list[int], Tensor]]:
    """Return theta, the players and how far each moves minus the weights, ``[P, d]``, by step."""
    ones = torch.ones(len(run.train[0]), dtype=torch.float64)
    path = run.path(ones)
    found, players, velocity = [], [], torch.zeros(0, len(path[0]), dtype=torch.float64)
    for step, rate in enumerate(run.rates):
        theta, batch = path[step], run.batches[step]
        fresh = run.gradients(theta, run.batch(step)) / len(batch)
        fresh = torch.cat([fresh, run.decay * theta[None]])
        kept = 1.0 if step == 0 or not run.momentum else 1 - run.dampening
        velocity = torch.cat([run.momentum * velocity, kept * fresh])
        players = [*players, *batch, DECAY]
        direct = torch.cat([torch.zeros_like(velocity[: -len(fresh)]), fresh])
        way = direct + run.momentum * velocity if run.nesterov else velocity
        found.append((theta, list(players), rate * run.paces() * way))
        torch.testing.assert_close(theta - found[-1][2].sum(0), path[step + 1], rtol=1e-12, atol=0)
    return found


def worth(run: Descent, theta: Tensor, move: Tensor, test: tuple, order: int) -> Tensor:
    """Return what the loss of each test example falls by when weights move by -move, ``[m]``."""
    slope = jacrev(lambda t: run.losses(t, test))(theta)
    fall = slope @ move
    if order == 2:
        curve = hessian(lambda t: run.losses(t, test))(theta)
        fall = fall - torch.einsum("jab,a,b->j", curve, move, move) / 2
    return fall


def fallen(run: Descent, test: tuple[Tensor, Tensor], order: int) -> Tensor:
    """Return the worth of all players of all steps together, ``[m]``."""
    return sum(worth(run, theta, way.sum(0), test, order) for theta, _, way in moves(run))


def enumerated(run: Descent, test: tuple[Tensor, Tensor], order: int) -> tuple[Tensor, Tensor]:
    """Return the Shapley values added up by example, ``[n, m]``, and those of decay, ``[m]``."""
    found = torch.zeros(len(run.train[0]) + 1, len(test[0]), dtype=torch.float64)
    for theta, players, way in moves(run):
        count = len(players)
        masks = torch.tensor(list(product([0.0, 1.0], repeat=count)), dtype=torch.float64)
        slope = jacrev(lambda t: run.losses(t, test))(theta)
        curve = hessian(lambda t: run.losses(t, test))(theta)
        moved = masks @ way  # [2^P, d]
        worths = moved @ slope.T
        if order == 2:
            worths = worths - torch.einsum("sa,jab,sb->sj", moved, curve, moved) / 2
        for place, player in enumerate(players):
            without = masks[:, place] == 0  # the sets with it come in the same order
            gains = worths[~without] - worths[without]
            sizes = masks[without].sum(1).long().tolist()
            weights = [factorial(s) * factorial(count - s - 1) / factorial(count) for s in sizes]
            found[player] += torch.tensor(weights, dtype=torch.float64) @ gains
    return found[:-1], found[-1]
