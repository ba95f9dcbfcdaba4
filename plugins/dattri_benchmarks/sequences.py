"""Settings of sequences: a causal transformer on tokens, retrained on parts of the train set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from dattri_parts.training import ModelRetraining, Recipe
from dattri_parts.training.orders import Order
from dattri_parts.training.recipe import Length
from torch import Tensor, nn

from dattri_benchmarks.finished_runs import FinishedRun, finished_run
from dattri_core import Counterfactual, InputError, Task, World

Array = np.ndarray[Any, Any]
LOSS = "causal-lm"
LEAST = 20
"""Sequences of each side."""


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
        build: Makes one. Its forward pass runs the same operations each time: on an accelerator the
            steps of training are recorded (`ModelRetraining`).
        recipe: How it is trained.
    """

    size: tuple[int, int]
    length: int
    vocabulary: int
    model: str
    build: Callable[[], nn.Module]
    recipe: Recipe


@frozen(eq=False)
class _Made:
    """What a world is made of before its network is trained."""

    scale: Scale
    threads: int | None
    data: Sequences
    retraining: ModelRetraining


@frozen(eq=False)
class SequenceSetting:
    """A `dattri_core.Setting` of next tokens, whose outcome is the loss: a sum over tokens.

    A train set of at most ``small.size[0]`` sequences is the small scale's: shorter sequences for a
    narrower network, so that a laptop trains a bank of them. Every larger one is the full scale's.

    Args:
        name: As registered.
        title: For people, with source and licence.
        read: ``(scale, seed) -> Sequences``, ``scale.size`` of them.
        full: As published.
        small: For a laptop.
        damping: See `dattri_core.World`.
        tf32: Whether networks are trained by matrix products in TF32 where there is a CUDA device,
            see `ModelRetraining`. Outcomes with and without are kept apart.
        order: In which order trainings read their examples; see `ModelRetraining`.
        length: How long trainings on a part of the train set last; see `ModelRetraining`.
    """

    name: str
    title: str
    read: Callable[[Scale, int], Sequences]
    full: Scale
    small: Scale
    damping: float
    metrics: tuple[str, ...] = ("lds",)
    tf32: bool = False
    order: Order = "own"
    length: Length = "epochs"

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the (train, test) sizes by name."""
        return {"full": self.full.size, "small": self.small.size}

    def load(
        self, size: tuple[int, int] | None = None, seed: int = 0, wrong: float | None = None
    ) -> World:
        """Return the world: the same numbers for the same arguments.

        A network that took long to train is kept and read back the next time, see `finished_run`.
        It is trained on a CUDA device where there is one.

        Args:
            size: (train, test) sequences; the full size by default.
            seed: Of the choice of sequences, the initial weights and the order of training.
            wrong: None or 0: sequences have no class labels that could be wrong.

        Raises:
            InputError: A size is below 20 or above what there is, or ``wrong`` is another.
        """
        made = self._made(size, seed, wrong)
        scale, retraining = made.scale, made.retraining
        whole = Counterfactual(np.ones(scale.size[0], dtype=bool), seed)
        run = finished_run(retraining, whole)
        model = _model(scale, run, retraining.device)
        right = [correct.mean().item() for correct in (run.train_correct, run.test_correct)]
        return World(
            task=Task(model, LOSS, checkpoints=[run.states[-1]]),
            trajectory=Task(
                model,
                LOSS,
                checkpoints=list(run.states),
                learning_rates=list(run.learning_rates),
            ),
            train=retraining.train_data,
            test=retraining.test_data,
            train_ids=made.data.train_ids,
            test_ids=made.data.test_ids,
            retraining=retraining,
            target="loss",
            damping=self.damping,
            threads=made.threads,
            facts={
                "data": self.title,
                "model": scale.model,
                "n_train": scale.size[0],
                "n_test": scale.size[1],
                "length": scale.length,
                "vocabulary": scale.vocabulary,
                "seed": seed,
                "device": retraining.device.type,
                "tf32": self.tf32 and retraining.device.type == "cuda",
                "parameters": sum(p.numel() for p in model.parameters()),
                "checkpoints": list(run.epochs),
                "train_accuracy": right[0] / (scale.length - 1),
                "test_accuracy": right[1] / (scale.length - 1),
                **made.data.facts,
            },
            steps=lambda: Task(model, LOSS, checkpoints=retraining.steps(whole)),
        )

    def retraining(
        self, size: tuple[int, int] | None = None, seed: int = 0, wrong: float | None = None
    ) -> ModelRetraining:
        """Return that of the world of the same arguments, without training its network.

        Raises:
            InputError: As `load` does.
        """
        return self._made(size, seed, wrong).retraining

    def _made(self, size: tuple[int, int] | None, seed: int, wrong: float | None) -> _Made:
        if wrong:
            raise InputError(
                f"setting {self.name!r}: wrong is {wrong!r}, and sequences have no class labels to "
                "change; leave it out"
            )
        size = self._size(self.full.size if size is None else size)
        small = size[0] <= self.small.size[0]
        scale = evolve(self.small if small else self.full, size=size)
        Counterfactual(np.ones(1, dtype=bool), seed)  # refused before anything is read
        data = self.read(scale, seed)
        threads = 1 if small else None
        return _Made(scale, threads, data, self._retraining(scale, threads, data))

    def _retraining(self, scale: Scale, threads: int | None, data: Sequences) -> ModelRetraining:
        train, test = (_tokens(part) for part in (data.train, data.test))
        cuda = torch.cuda.is_available()
        return ModelRetraining(
            build=scale.build,
            recipe=scale.recipe,
            loss=LOSS,
            train_data=(train, train),
            test_data=(test, test),
            targets=("loss",),
            about={"setting": self.name, "network": scale.model},
            device="cuda" if cuda else "cpu",
            threads=threads,
            recorded=cuda,
            tf32=self.tf32,
            order=self.order,
            length=self.length,
        )

    def _size(self, size: Any) -> tuple[int, int]:
        try:
            n_train, n_test = (int(count) for count in size)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"setting {self.name!r}: size is {size!r}, expected (train, test)"
            ) from error
        if min(n_train, n_test) < LEAST:
            raise InputError(
                f"setting {self.name!r}: sizes are {(n_train, n_test)}; give at least {LEAST} of "
                "each"
            )
        return n_train, n_test


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


def _model(scale: Scale, run: FinishedRun, device: torch.device) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # its weights are replaced
        model = scale.build()
    model.load_state_dict(run.states[-1])
    return model.to(device).eval()
