"""A world whose retraining is known in closed form: outcomes are sums of effects, plus noise."""

from __future__ import annotations

import numpy as np
import torch
from attrs import evolve, field, frozen
from torch import nn

from dattri_core import Evidence, Task, World


@frozen(eq=False)
class Additive:
    """Loss of test j after training on a mask: base_j - sum of effects_ij + noise by the seed.

    It is a `Retraining`, and a store of its own `Outcomes`; what was asked for is in ``asked``.
    """

    effects: np.ndarray
    base: float = 10.0
    noise: float = 0.0
    threshold: float = 0.0
    asked: list = field(factory=list)
    fingerprint = "additive"
    together = 1
    targets = {"loss": False, "correct": True, "gain": True}

    @property
    def n_train(self):
        return self.effects.shape[0]

    @property
    def n_test(self):
        return self.effects.shape[1]

    def loss(self, counterfactual):
        effect = counterfactual.mask @ self.effects
        drawn = np.random.default_rng([counterfactual.seed, 9]).normal(size=self.n_test)
        return self.base - effect + self.noise * drawn

    def outcomes(self, counterfactuals, target):
        self.asked.extend(counterfactuals)
        losses = np.stack([self.loss(c) for c in counterfactuals])
        if target == "loss":
            return losses
        if target == "gain":
            return -losses
        return (losses < self.base - self.threshold).astype(float)

    def train(self, counterfactuals):
        for counterfactual in counterfactuals:
            torch.manual_seed(counterfactual.seed)
            yield nn.Linear(4, 3).state_dict()

    def measure(self, state):
        raise NotImplementedError


def world_of(retraining, target="loss", **changes):
    torch.manual_seed(0)
    n, m = retraining.n_train, retraining.n_test
    model = nn.Linear(4, 3)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = np.random.default_rng(0)
    labels = torch.from_numpy(random.integers(0, 3, n))
    made = World(
        task=Task(model, checkpoints=[state]),
        trajectory=Task(model, checkpoints=[state], learning_rates=[0.25]),
        train=(torch.randn(n, 4), labels),
        test=(torch.randn(m, 4), torch.from_numpy(random.integers(0, 3, m))),
        train_ids=tuple(f"a{i}" for i in range(n)),
        test_ids=tuple(f"b{j}" for j in range(m)),
        retraining=retraining,
        target=target,
        damping=0.1,
        threads=None,
        facts={
            "subclasses": {
                "train": random.integers(0, 5, n).tolist(),
                "test": random.integers(0, 5, m).tolist(),
            },
            "shortcut": {
                "train": (np.arange(n) % 3 == 0).tolist(),
                "test": (np.arange(m) % 2 == 0).tolist(),
            },
            "sources": {
                "train": [("web", "book")[i % 2] for i in range(n)],
                "test": [("web", "book")[j % 2] for j in range(m)],
            },
        },
        true_labels=np.where(np.arange(n) % 4 == 0, (labels.numpy() + 1) % 3, labels.numpy()),
    )
    return evolve(made, **changes)


def evidence_of(scores, retraining, *, target="loss", **changes):
    given = {
        "scores": scores,
        "self_influence": None,
        "world": world_of(retraining, target),
        "outcomes": retraining,
        **changes,
    }
    return Evidence(**given)


def effects(n=24, m=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, m))
