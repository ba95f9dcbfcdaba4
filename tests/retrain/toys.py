"""A retraining that takes no time and whose outcomes depend on mask, seed and data."""

from __future__ import annotations

import hashlib
import os
import signal
import time

import numpy as np
import torch
from attrs import field, frozen

N, M, D = 12, 5, 3


def toy_data(n, m=M, seed=0):
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(n + m, D))
    labels = inputs @ [1.0, -2.0, 0.5] + 0.3 * random.normal(size=n + m)
    return (inputs[:n], labels[:n]), (inputs[n:], labels[n:])


@frozen(eq=False)
class Toy:
    """Least squares by a few gradient steps from weights that the seed draws."""

    n_train: int = N
    n_test: int = M
    together: int = 1
    steps: int = 10
    die_after: int | None = None  # kills its process when as many models were trained
    stop_after: int | None = None  # Ctrl-C
    diverges: bytes | None = None  # the key of one whose outcomes are not finite
    pause: float = 0.0
    calls: list[tuple[bytes, ...]] = field(factory=list)

    targets = {"loss": False, "margin": True}

    @property
    def fingerprint(self):
        text = repr((self.n_train, self.n_test, self.steps))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def data(self):
        return toy_data(self.n_train, self.n_test)

    def weights(self, counterfactual):
        x, y = (part[counterfactual.mask] for part in self.data[0])
        w = np.random.default_rng(counterfactual.seed).normal(size=D)
        for _ in range(self.steps):
            w = w - 0.1 * x.T @ (x @ w - y) / len(x)
        return w

    def train(self, counterfactuals):
        self.calls.append(tuple(c.key for c in counterfactuals))
        for counterfactual in counterfactuals:
            trained = sum(map(len, self.calls[:-1])) + counterfactuals.index(counterfactual)
            if self.die_after == trained:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.stop_after == trained:
                raise KeyboardInterrupt
            time.sleep(self.pause)
            w = self.weights(counterfactual)
            yield {
                "w": torch.from_numpy(w * (np.nan if counterfactual.key == self.diverges else 1))
            }

    def measure(self, state):
        x, y = self.data[1]
        predicted = x @ state["w"].numpy()
        return {"loss": (predicted - y) ** 2, "margin": predicted * np.sign(y)}

    def expected(self, counterfactuals, target):
        states = [{"w": torch.from_numpy(self.weights(c))} for c in counterfactuals]
        return np.stack([self.measure(state)[target] for state in states])

    @property
    def trained(self):
        return sum(map(len, self.calls))
