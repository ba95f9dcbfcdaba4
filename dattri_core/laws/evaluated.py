"""A toy world for the laws of metrics: least squares on two classes, trained again exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from dattri_core.experiment import Counterfactual, World
from dattri_core.laws.worlds import random
from dattri_core.task import Task

Array = np.ndarray[Any, Any]
N_TRAIN, N_TEST, WIDTH = 24, 8, 3
WRONG = (2, 9, 16, 21)
"""Train examples with the wrong one of the two labels."""
RATE = 0.05
"""L2 rate of the models."""
JITTER = 0.02
"""How far seeds move the weights."""
TARGETS = {"margin": True, "correct": True, "loss": False}


@frozen(eq=False)
class Examples:
    """Inputs ``[n, d]`` and labels ``[n]`` of two classes, those of training and the true ones."""

    inputs: Tensor
    labels: Tensor
    true: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, order: Array) -> Examples:
        """Return them in another order."""
        return Examples(self.inputs[order], self.labels[order], self.true[order])

    @property
    def widened(self) -> Tensor:
        """Return the inputs with a one for the bias, ``[n, d + 1]``."""
        return torch.cat([self.inputs, torch.ones(len(self), 1, dtype=torch.float64)], 1)

    @property
    def hot(self) -> Tensor:
        """Return the labels as rows of 0 and 1, ``[n, 2]``."""
        return nn.functional.one_hot(self.labels, 2).double()


def _examples(count: int, seed: int, wrong: Sequence[int] = ()) -> Examples:
    true = torch.arange(count) % 2
    middle = torch.stack([true * 2.0 - 1, *[torch.zeros(count)] * (WIDTH - 1)], 1)
    labels = true.clone()
    labels[list(wrong)] = 1 - true[list(wrong)]
    return Examples(middle + 0.7 * random(count, WIDTH, seed=seed), labels, true)


@frozen
class LeastSquares:
    """A `Retraining` in closed form: W = argmin mean |W x - e_y|^2 / 2 + rate / 2 |W|^2.

    The seed moves the weights a little.

    Args:
        train_examples: Those that masks choose from.
        test_examples: Those that are measured.
        together: How many train sets are solved for at once.
        fingerprint: Of nothing: no outcomes are kept.
    """

    train_examples: Examples
    test_examples: Examples
    together: int = 64
    fingerprint: str = "least squares"

    @property
    def n_train(self) -> int:
        """Return the number of train examples."""
        return len(self.train_examples)

    @property
    def n_test(self) -> int:
        """Return the number of test examples."""
        return len(self.test_examples)

    @property
    def targets(self) -> Mapping[str, bool]:
        """Return what is measured, and whether more of it is better."""
        return TARGETS

    def train(self, counterfactuals: Sequence[Counterfactual]) -> Iterator[Mapping[str, Tensor]]:
        """Yield the weights for each train set."""
        for weights in self.weights(counterfactuals):
            yield {"weight": weights[:-1].T.contiguous(), "bias": weights[-1].clone()}

    def weights(self, counterfactuals: Sequence[Counterfactual]) -> Tensor:
        """Return those of all train sets, the bias last, ``[k, d + 1, 2]``."""
        inputs, hot = self.train_examples.widened, self.train_examples.hot
        kept = torch.from_numpy(np.stack([one.mask for one in counterfactuals])).double()
        share = (kept / kept.sum(1, keepdim=True))[:, :, None]
        matrices = inputs.T @ (share * inputs)
        matrices.diagonal(dim1=1, dim2=2).add_(RATE)
        solved: Tensor = torch.linalg.solve(matrices, inputs.T @ (share * hot))
        moves = {one.seed: random(*solved.shape[1:], seed=one.seed) for one in counterfactuals}
        return solved + JITTER * torch.stack([moves[one.seed] for one in counterfactuals])

    def measure(self, state: Mapping[str, Tensor]) -> Mapping[str, Array]:
        """Return the margin, whether it is above zero, and the cross-entropy of every test."""
        weights = torch.cat([state["weight"].T, state["bias"][None]])
        return {name: values[0] for name, values in self.measured(weights[None]).items()}

    def measured(self, weights: Tensor) -> Mapping[str, Array]:
        """Return every target of several models, each ``[k, n_test]``."""
        outputs = self.test_examples.widened @ weights
        signs = 2 * self.test_examples.hot - 1
        margin = (outputs * signs).sum(2)
        loss = nn.functional.softplus(-margin)
        found = {"margin": margin, "correct": (margin > 0).double(), "loss": loss}
        return {name: values.numpy() for name, values in found.items()}


def curvature(inputs: Tensor) -> Tensor:
    """Return H = mean x x^T + rate I, ``[d + 1, d + 1]``."""
    return inputs.T @ inputs / len(inputs) + RATE * torch.eye(inputs.shape[1], dtype=torch.float64)


@frozen(eq=False)
class Asked:
    """The `Outcomes` of a retraining, each model trained when it is first asked for."""

    retraining: LeastSquares
    found: dict[bytes, Mapping[str, Array]]

    def outcomes(self, counterfactuals: Sequence[Counterfactual], target: str) -> Array:
        """Return the target of each model on every test example, ``[k, n_test]``."""
        new = {one.key: one for one in counterfactuals if one.key not in self.found}
        if new:
            found = self.retraining.measured(self.retraining.weights(list(new.values())))
            for place, key in enumerate(new):
                self.found[key] = {name: values[place] for name, values in found.items()}
        return np.stack([self.found[one.key][target] for one in counterfactuals])


@frozen(eq=False, slots=False)
class Evaluated:
    """Two classes that lie apart, a sixth of the train labels wrong, and what influence says.

    Args:
        train_examples: Of two classes.
        test_examples: All with their true labels.
        facts: Names of facts that are asked for: truth values here, whether the label is 1.
    """

    train_examples: Examples
    test_examples: Examples
    facts: tuple[str, ...]

    @classmethod
    def made(cls, facts: Sequence[str] = ()) -> Evaluated:
        """Return the world, the same one every time."""
        return cls(_examples(N_TRAIN, 60, WRONG), _examples(N_TEST, 61), tuple(facts))

    def ordered(self, train: Array, test: Array) -> Evaluated:
        """Return the same examples in another order."""
        one, two = self.train_examples.take(train), self.test_examples.take(test)
        return evolve(self, train_examples=one, test_examples=two)

    @cached_property
    def retraining(self) -> LeastSquares:
        """Return how it is trained again."""
        return LeastSquares(self.train_examples, self.test_examples)

    @cached_property
    def outcomes(self) -> Asked:
        """Return what models of other train sets answer."""
        return Asked(self.retraining, {})

    @cached_property
    def world(self) -> World:
        """Return it as metrics see it."""
        train, test = self.train_examples, self.test_examples
        everything = Counterfactual(np.ones(len(train), dtype=bool))
        (state,) = self.retraining.train([everything])
        model = nn.Linear(WIDTH, 2).double().eval()
        model.load_state_dict(state)
        said = {
            name: {side: (rows.labels == 1).tolist() for side, rows in self._sides().items()}
            for name in self.facts
        }
        return World(
            task=Task(model, "cross-entropy", checkpoints=[state]),
            trajectory=Task(model, "cross-entropy", checkpoints=[state], learning_rates=[0.1]),
            train=(train.inputs, train.labels),
            test=(test.inputs, test.labels),
            train_ids=tuple(f"train {i}" for i in range(len(train))),
            test_ids=tuple(f"test {j}" for j in range(len(test))),
            retraining=self.retraining,
            target="margin",
            damping=RATE,
            threads=1,
            facts={"data": "a toy world", **said},
            true_labels=train.true.numpy(),
        )

    def _sides(self) -> Mapping[str, Examples]:
        return {"train": self.train_examples, "test": self.test_examples}

    def attribute(self, task: Task) -> Array:
        """Return the influence of each train example on each margin, ``[n_train, n_test]``."""
        inputs, error = self._errors(task)
        tests = self.test_examples.widened
        signs = 2 * self.test_examples.hot - 1  # the margin's slope in the outputs
        near = inputs @ torch.linalg.solve(curvature(inputs), tests.T)
        return np.asarray((-(error @ signs.T) * near).numpy())

    @cached_property
    def self_influence(self) -> Array:
        """Return g_i^T H^-1 g_i of each train example, ``[n_train]``."""
        inputs, error = self._errors(self.world.task)
        near = (inputs * torch.linalg.solve(curvature(inputs), inputs.T).T).sum(1)
        return np.asarray((error.square().sum(1) * near).numpy())

    def _errors(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return x and W x - e_y of all train examples at a task's weights."""
        state = task.checkpoints[-1].load(task.model)
        weights = torch.cat([state["weight"], state["bias"][:, None]], 1)
        inputs = self.train_examples.widened
        return inputs, inputs @ weights.T - self.train_examples.hot
