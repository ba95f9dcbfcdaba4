"""Oracles of runs of gradient descent: differentiated whole, carried back densely, run again."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, vmap


@frozen(eq=False)
class Descent:
    """A run of theta' = theta - rate (1/|B| sum_{i in B} w_i grad loss_i + decay theta).

    Args:
        model: Evaluated in eval mode; its weights now are the start.
        loss: ``(outputs, labels) -> [B]``.
        train: Inputs and labels.
        batches: Positions of each step.
        rates: Learning rate of each step.
        decay: Weight decay.
        momentum, dampening, nesterov: Of the velocity v' = momentum v + (1 - dampening) d, where d
            is the gradient with decay and the first v' is d; theta' = theta - rate v', or theta -
            rate (d + momentum v').
        adam: (b1, b2, epsilon, whether decay is decoupled); None: gradient descent.
        clip: Largest norm of the gradient without decay, as torch clips it.
        frozen: Parameters that are not trained.
        scale: What is minimised over the mean loss.
        shares: By name, what multiplies the learning rate of a parameter.
    """

    model: torch.nn.Module
    loss: object
    train: tuple[Tensor, Tensor]
    batches: list[list[int]]
    rates: list[float]
    decay: float | dict[str, float] = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    adam: tuple[float, float, float, bool] | None = None
    clip: float | None = None
    frozen: tuple[str, ...] = ()
    scale: float = 1.0
    shares: dict[str, float] | None = None

    def paces(self) -> Tensor | float:
        """Return what multiplies the learning rate of each number, or 1."""
        if self.shares is None:
            return 1.0
        named = self.model.named_parameters()
        return torch.cat([torch.full_like(p, self.shares[n]).flatten() for n, p in named])

    def moving(self) -> Tensor:
        """Return 1 for each number that is trained, else 0."""
        named = self.model.named_parameters()
        return torch.cat([torch.full_like(p, n not in self.frozen).flatten() for n, p in named])

    def decays(self) -> Tensor | float:
        """Return the weight decay of each number, or of all."""
        if not isinstance(self.decay, dict):
            return self.decay
        named = self.model.named_parameters()
        return torch.cat([torch.full_like(p, self.decay[n]).flatten() for n, p in named])

    def start(self) -> Tensor:
        """Return the weights now, flat."""
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def losses(self, theta: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of each example at flat weights."""
        named, at = {}, 0
        for name, p in self.model.named_parameters():
            named[name] = theta[at : at + p.numel()].reshape(p.shape)
            at += p.numel()
        return self.loss(functional_call(self.model, named, (data[0],)), data[1])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the examples of a step."""
        index = torch.tensor(self.batches[step])
        return self.train[0][index], self.train[1][index]

    def path(self, weights: Tensor) -> list[Tensor]:
        """Return the weights before each step and after the last, with w_i on example i."""
        theta, path, velocity = self.start(), [], None
        first = second = torch.zeros_like(theta)
        for step, rate in enumerate(self.rates):
            path.append(theta)
            rate = rate * self.paces()
            index = torch.tensor(self.batches[step])

            def mean(theta: Tensor, step: int = step, index: Tensor = index) -> Tensor:
                return (weights[index] * self.losses(theta, self.batch(step))).sum() / len(index)

            slope = self.scale * grad(mean)(theta) * self.moving()
            if self.clip is not None:
                slope = slope * (self.clip / (slope.norm() + 1e-6)).clamp(max=1)
            if self.adam is not None:
                beta1, beta2, epsilon, decoupled = self.adam
                shrunk = self.decays() * theta
                slope = slope if decoupled else slope + shrunk
                first = beta1 * first + (1 - beta1) * slope
                second = beta2 * second + (1 - beta2) * slope**2
                still = 1 - self.moving()  # the root has no derivative at 0
                root = (second / (1 - beta2 ** (step + 1)) + still).sqrt() + epsilon
                theta = theta - rate * (first / (1 - beta1 ** (step + 1)) / root)
                theta = theta - rate * shrunk if decoupled else theta
                continue
            slope = slope + self.decays() * theta
            if velocity is None:
                velocity = slope
            else:
                velocity = self.momentum * velocity + (1 - self.dampening) * slope
            way = velocity if self.momentum else slope
            theta = theta - rate * (slope + self.momentum * way if self.nesterov else way)
        return [*path, theta]

    def gradients(self, theta: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        """Return the gradient of each example, ``[B, d]``."""
        return jacrev(lambda t: self.losses(t, data))(theta)

    def hessian(self, theta: Tensor, step: int) -> Tensor:
        """Return the Hessian of the mean loss of a step's batch."""
        return hessian(lambda t: self.losses(t, self.batch(step)).mean())(theta)


def differentiated(run: Descent, test: tuple[Tensor, Tensor]) -> Tensor:
    """Return -d loss_j(theta_T) / d w_i at w = 1 through the whole run, ``[n, m]``."""
    ones = torch.ones(len(run.train[0]), dtype=torch.float64)
    return -jacrev(lambda w: run.losses(run.path(w)[-1], test))(ones).T


def carried_back(
    run: Descent, test: tuple[Tensor, Tensor], sketch: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return sum_s (eta / |B|) <P g_i, psi_s> H_s = E_B[P g (P g)^T], and its steps."""
    ones = torch.ones(len(run.train[0]), dtype=torch.float64)
    path = run.path(ones)
    sketch = torch.eye(len(path[0]), dtype=torch.float64) if sketch is None else sketch
    psi = run.gradients(path[-1], test) @ sketch.T
    parts = []
    for step in reversed(range(len(run.rates))):
        rate, index = run.rates[step], run.batches[step]
        rows = run.gradients(path[step], run.batch(step)) @ sketch.T
        part = torch.zeros(len(run.train[0]), len(psi), dtype=torch.float64)
        for row, i in zip(rows, index, strict=True):
            part[i] += rate / len(index) * (psi @ row)
        parts.append(part)
        curve = rows.T @ rows / len(index)
        eye = torch.eye(len(curve), dtype=torch.float64)
        psi = psi @ ((1 - rate * run.decay) * eye - rate * curve)
    return torch.stack(parts).sum(0), parts[::-1]


def left_out(run: Descent, test: tuple[Tensor, Tensor]) -> Tensor:
    """Return loss_j(run without i) - loss_j(run) for the same batches, ``[n, m]``."""
    n = len(run.train[0])
    ones = torch.ones(n, dtype=torch.float64)

    def end(weights: Tensor) -> Tensor:
        return run.losses(run.path(weights)[-1], test)

    removed = vmap(end, chunk_size=64)(ones - torch.eye(n, dtype=torch.float64))
    return removed - end(ones)
