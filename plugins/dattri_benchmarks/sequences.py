"""Settings of sequences: a causal transformer on tokens, retrained on parts of the train set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from dattri_parts.training import ModelRetraining, Recipe
from torch import Tensor, nn

from dattri_core import Counterfactual, InputError, Task, World

Array = np.ndarray[Any, Any]
LOSS = "causal-lm"


@frozen(eq=False)
class Sequences:
    """Train and test sequences of token numbers ``[n, length]``, their names, and JSON facts."""

    train: Array
    test: Array
    train_ids: tuple[str, ...]
    test_ids: tuple[str, ...]
    facts: Mapping[str, Any]


@frozen
class Scale:
    """What is trained at one size of a setting.

    Args:
        size: (train, test) sequences.
        length: Tokens of a sequence.
        vocabulary: Distinct tokens.
        model: The network, for people.
        build: Makes one.
        recipe: How it is trained.
    """

    size: tuple[int, int]
    length: int
    vocabulary: int
    model: str
    build: Callable[[], nn.Module]
    recipe: Recipe


@frozen(eq=False)
class SequenceSetting:
    """Next-token prediction; a `dattri_core.Setting`.

    A train set of at most ``small.size[0]`` sequences is the small scale's: shorter sequences for a
    narrower network, so that a laptop trains a bank of them. Every larger one is the full scale's.

    Args:
        name: As registered.
        title: For people, with source and licence.
        read: ``(scale, seed) -> Sequences``, ``scale.size`` of them.
        full: As published.
        small: For a laptop.
        damping: See `dattri_core.World`.
    """

    name: str
    title: str
    read: Callable[[Scale, int], Sequences]
    full: Scale
    small: Scale
    damping: float
    metrics: tuple[str, ...] = ("lds",)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the (train, test) sizes by name."""
        return {"full": self.full.size, "small": self.small.size}

    def load(
        self, size: tuple[int, int] | None = None, seed: int = 0, wrong: float | None = None
    ) -> World:
        """Return the world: the same numbers for the same arguments.

        Args:
            size: (train, test) sequences; the full size by default.
            seed: Of the choice of sequences, the initial weights and the order of training.
            wrong: None: sequences have no class labels that could be wrong.

        Raises:
            InputError: A size is below 2 or above what there is, or ``wrong`` is given.
        """
        if wrong:
            raise InputError(
                f"setting {self.name!r}: wrong is {wrong}, and sequences have no class labels; "
                "leave it out"
            )
        size = size or self.full.size
        if min(size) < 2:
            raise InputError(f"setting {self.name!r}: sizes are {size}; give at least 2 of each")
        scale = evolve(self.small if size[0] <= self.small.size[0] else self.full, size=size)
        data = self.read(scale, seed)
        return self._world(scale, data, seed)

    def _world(self, scale: Scale, data: Sequences, seed: int) -> World:
        train, test = (_tokens(part) for part in (data.train, data.test))
        facts = {
            "data": self.title,
            "model": scale.model,
            "length": scale.length,
            "vocabulary": scale.vocabulary,
            "seed": seed,
            **data.facts,
        }
        retraining = ModelRetraining(
            build=scale.build,
            recipe=scale.recipe,
            loss=LOSS,
            train_data=(train, train),
            test_data=(test, test),
            targets=("loss",),
            about={"setting": self.name, "model": scale.model},
            device="cuda" if torch.cuda.is_available() else "cpu",
            threads=None,
        )
        run = retraining.run(Counterfactual(np.ones(len(train), np.bool_), seed))
        losses = retraining.measure(run.states[-1])["loss"]
        return World(
            task=Task(run.model, LOSS, checkpoints=[run.states[-1]]),
            trajectory=Task(
                run.model,
                LOSS,
                checkpoints=list(run.states),
                learning_rates=list(run.learning_rates),
            ),
            train=(train, train),
            test=(test, test),
            train_ids=data.train_ids,
            test_ids=data.test_ids,
            retraining=retraining,
            target="loss",
            damping=self.damping,
            threads=None,
            facts={
                **facts,
                "n_train": len(train),
                "n_test": len(test),
                "parameters": sum(p.numel() for p in run.model.parameters()),
                "test_loss_per_token": float(losses.mean()) / (scale.length - 1),
                "checkpoints": list(run.epochs),
            },
        )


def choose(count: int, there_are: int, seed: int, what: str) -> Array:
    """Return the positions of so many sequences, drawn without replacement, in rising order.

    Raises:
        InputError: There are fewer.
    """
    if count > there_are:
        raise InputError(f"{count} {what} sequences, and there are {there_are}; ask for fewer")
    chosen = np.random.default_rng([seed, 4, what == "test"]).permutation(there_are)[:count]
    return np.sort(chosen)


def _tokens(sequences: Array) -> Tensor:
    return torch.from_numpy(sequences.astype(np.int64))
