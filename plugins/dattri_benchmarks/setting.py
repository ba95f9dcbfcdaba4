"""A setting: data, a model and how it is trained; every method answers the same question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from attrs import frozen
from dattri_parts.training import ModelRetraining, Recipe, Run
from torch import Tensor, nn

from dattri_core import Counterfactual, InputError, Task

Array = np.ndarray[Any, Any]
Size = tuple[int, int]


@frozen(eq=False)
class World:
    """A trained model with its data.

    Args:
        task: The model at the end of training.
        trajectory: The same model with several checkpoints of its run and their learning rates.
        train: ``(inputs [n, ...], labels [n])`` as trained on; some labels are wrong.
        test: ``(inputs [m, ...], labels [m])``, all correct.
        train_ids: Name of each train example.
        test_ids: Name of each test example.
        train_images: ``[n, height, width]`` bytes, 0 is background and 255 ink.
        test_images: ``[m, height, width]``.
        true_labels: ``[n]``, the train labels before some were flipped.
        flipped: ``[n]``, where the train label is wrong.
        damping: For inverse Hessians of the mean train loss. At a smooth minimum of the loss plus
            (w / 2) |theta|^2 the Hessian of the loss has no eigenvalue below -w, so a damping above
            the weight decay w makes it positive; training stops near a minimum, hence the margin.
        threads: That pay for a network of this size; None leaves it to the library. Where a step
            is too short to share, a second thread only waits, and on a busy machine costs much.
        facts: What was trained and how well, JSON-ready.
    """

    task: Task
    trajectory: Task
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    train_ids: tuple[str, ...]
    test_ids: tuple[str, ...]
    train_images: Array
    test_images: Array
    true_labels: Array
    flipped: Array
    damping: float
    threads: int | None
    facts: Mapping[str, Any]


@frozen
class Setting:
    """A named way to make a `World`.

    Args:
        name: As registered.
        title: For people, with source and licence.
        size: Default (train, test) sizes.
        build: ``(size, seed) -> World``.
    """

    name: str
    title: str
    size: Size
    build: Callable[[Size, int], World]

    def load(self, size: Size | None = None, seed: int = 0) -> World:
        """Return the world: the same numbers for the same size and seed.

        Args:
            size: (train, test) examples.
            seed: Of the split, the flipped labels, the initial weights and the order of training.

        Raises:
            InputError: A size is below 20, or above what the data set has.
        """
        size = size or self.size
        if min(size) < 20:
            raise InputError(f"setting {self.name!r}: sizes are {size}; give at least 20 of each")
        return self.build(size, seed)


def flip_labels(labels: Array, classes: int, share: float, seed: int) -> tuple[Array, Array]:
    """Return labels of which a share is replaced by another class, and where.

    ``round(share * n)`` examples are drawn without replacement, and each gets one of the other
    classes with equal chance.
    """
    random = np.random.default_rng([seed, 1])
    chosen = random.choice(len(labels), size=round(share * len(labels)), replace=False)
    noisy = labels.copy()
    noisy[chosen] = (labels[chosen] + random.integers(1, classes, len(chosen))) % classes
    return noisy, noisy != labels


def train_on_all(
    build: Callable[[], nn.Module],
    recipe: Recipe,
    inputs: tuple[Tensor, Tensor],
    labels: tuple[Array, Array],
    seed: int,
) -> Run:
    """Return the run of a classifier on the whole train set; (train, test) in each pair."""
    train, test = (
        (x, torch.from_numpy(y.astype(np.int64))) for x, y in zip(inputs, labels, strict=True)
    )
    retraining = ModelRetraining(build, recipe, "cross-entropy", train, test, ("loss",), {})
    return retraining.run(Counterfactual(np.ones(len(labels[0]), dtype=bool), seed))


def make_world(
    run: Run,
    inputs: tuple[Tensor, Tensor],
    labels: tuple[Array, Array],
    images: tuple[Array, Array],
    ids: tuple[tuple[str, ...], tuple[str, ...]],
    true_labels: Array,
    damping: float,
    threads: int | None,
    facts: Mapping[str, Any],
) -> World:
    """Put a finished run and its data together; (train, test) in each pair."""
    train, test = (
        (x, torch.from_numpy(y.astype(np.int64))) for x, y in zip(inputs, labels, strict=True)
    )
    final = run.states[-1]
    run.model.load_state_dict(final)
    flipped = labels[0] != true_labels
    parameters = sum(p.numel() for p in run.model.parameters())
    with torch.no_grad():
        hits = [(run.model(x).argmax(1) == y).numpy() for x, y in (train, test)]
    return World(
        task=Task(run.model, "cross-entropy", checkpoints=[final]),
        trajectory=Task(
            run.model,
            "cross-entropy",
            checkpoints=list(run.states),
            learning_rates=list(run.learning_rates),
        ),
        train=train,
        test=test,
        train_ids=ids[0],
        test_ids=ids[1],
        train_images=images[0],
        test_images=images[1],
        true_labels=true_labels,
        flipped=flipped,
        damping=damping,
        threads=threads,
        facts={
            "n_train": len(flipped),
            "n_test": len(labels[1]),
            "flipped": int(flipped.sum()),
            "parameters": parameters,
            "test_accuracy": float(hits[1].mean()),
            "train_accuracy": float(hits[0].mean()),
            "flipped_fitted": float(hits[0][flipped].mean()),
            "checkpoints": list(run.epochs),
            **facts,
        },
    )
