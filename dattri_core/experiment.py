"""Experiments: train sets that might have been, what models trained on them answer, and metrics.

A `Setting` makes a `World`: data, a trained model, and how to train it again. A `Metric` compares
scores with what the world knows: wrong labels, or the `Outcomes` of models that were trained on
other train sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import field, frozen
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from dattri_core.errors import InputError
from dattri_core.task import Task

Array = np.ndarray[Any, Any]


def _mask(value: Any) -> Array:
    mask = np.asarray(value)
    if mask.ndim != 1 or mask.dtype != np.bool_:
        raise InputError(
            f"counterfactual: the mask is {mask.dtype} of shape {mask.shape}, expected one truth "
            "value for each train example, [n_train]; of positions it is "
            "numpy.isin(numpy.arange(n_train), positions)"
        )
    if not mask.any():
        raise InputError(
            f"counterfactual: the mask of {len(mask)} examples keeps none; a model needs a train "
            "set"
        )
    mask = mask.copy()
    mask.flags.writeable = False
    return mask


@frozen(eq=False)
class Counterfactual:
    """A train set that might have been, and the seed of the training.

    Args:
        mask: ``[n_train]`` truth values: which examples were trained on.
        seed: Of all random numbers of the training, initial weights and order of examples; from 0
            to 2^32 - 1.
    """

    mask: Array = field(converter=_mask)
    seed: int = field(default=0)

    @seed.validator
    def _check_seed(self, _: Any, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
            raise InputError(
                f"counterfactual: the seed is {value!r}, expected an integer from 0 to 2^32 - 1"
            )

    @property
    def key(self) -> bytes:
        """Return what tells two apart: the seed and the bits of the mask."""
        bits = np.packbits(self.mask, bitorder="little").tobytes()
        return self.seed.to_bytes(4, "little") + bits


@runtime_checkable
class Retraining(Protocol):
    """How a model comes from a train set, always from scratch, and what is measured of it."""

    @property
    def fingerprint(self) -> str:
        """Return a hash of everything but the counterfactual that outcomes depend on.

        Data, model, recipe and what is measured: two trainings that differ never share outcomes.
        """
        ...

    @property
    def n_train(self) -> int:
        """Return the number of examples that a mask chooses from."""
        ...

    @property
    def n_test(self) -> int:
        """Return the number of test examples."""
        ...

    @property
    def targets(self) -> Mapping[str, bool]:
        """Return what is measured, by name, and whether more of it is better."""
        ...

    @property
    def together(self) -> int:
        """Return how many counterfactuals are best trained by one call of `train`."""
        ...

    def train(self, counterfactuals: Sequence[Counterfactual]) -> Iterator[Mapping[str, Tensor]]:
        """Yield the state dict of a model for each counterfactual, in their order.

        What is yielded for one does not depend on which others are trained with it.
        """
        ...

    def measure(self, state: Mapping[str, Tensor]) -> Mapping[str, Array]:
        """Return the outcome of every target on every test example, each ``[n_test]``."""
        ...


@runtime_checkable
class Outcomes(Protocol):
    """Answers what models trained on other train sets give; trains those that are missing."""

    def outcomes(self, counterfactuals: Sequence[Counterfactual], target: str) -> Array:
        """Return ``[len(counterfactuals), n_test]``, float64."""
        ...


@frozen(eq=False)
class World:
    """A trained model with its data, and how to train it again.

    Args:
        task: The model at the end of training on all of ``train``.
        trajectory: The same model with several checkpoints of its run and their learning rates.
        train: As trained on, a nest of tensors that begin with ``[n_train]``; labels come last.
        test: The same for the test set, all labels correct.
        train_ids: Name of each train example.
        test_ids: Name of each test example.
        retraining: How ``task`` was trained; on any subset of ``train``.
        target: The outcome of ``retraining`` that scores are compared with.
        damping: For inverse Hessians of the mean train loss. At a smooth minimum of the loss plus
            (w / 2) |theta|^2 the Hessian of the loss has no eigenvalue below -w, so a damping above
            the weight decay w makes it positive; training stops near a minimum, hence the margin.
        threads: That pay for a network of this size; None leaves it to the library. Where a step
            is too short to share, a second thread only waits, and on a busy machine costs much.
        facts: What was trained and how well, JSON-ready.
        true_labels: ``[n_train]``, the train labels before some were changed; None without classes.
        pictures: Of the train and of the test examples, ``[n, height, width]`` bytes where 0 is
            background and 255 ink, or ``[n, height, width, 3]``; None where there are none.
        steps: Gives the run of ``trajectory`` step by step, trained again: its checkpoints are the
            weights before every step, with the `TrainingStep` that was taken, and those at the end.
            None where it was not one of gradient descent.
    """

    task: Task
    trajectory: Task
    train: Any
    test: Any
    train_ids: tuple[str, ...]
    test_ids: tuple[str, ...]
    retraining: Retraining
    target: str
    damping: float
    threads: int | None = None
    facts: Mapping[str, Any] = field(factory=dict)
    true_labels: Array | None = None
    pictures: tuple[Array, Array] | None = None
    steps: Callable[[], Task] | None = None

    @property
    def flipped(self) -> Array:
        """Return where the train label is wrong, ``[n_train]``.

        Raises:
            InputError: The world has no classes.
        """
        if self.true_labels is None:
            raise InputError("world: its examples have no class labels, so none can be wrong")
        wrong: Array = self.train[-1].numpy() != self.true_labels
        return wrong


@runtime_checkable
class Setting(Protocol):
    """A named way to make a `World`."""

    @property
    def title(self) -> str:
        """Return its name for people, with source and licence of the data."""
        ...

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """Return (train, test) sizes by name: ``"full"`` as published, ``"small"`` for a laptop."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Return the metrics that it is meant for, by their registered names."""
        ...

    def load(
        self, size: tuple[int, int] | None = None, seed: int = 0, wrong: float | None = None
    ) -> World:
        """Return the world: the same numbers for the same arguments.

        Args:
            size: (train, test) examples; ``sizes["full"]`` by default.
            seed: Of the split, the changed labels, the initial weights and the order of training.
            wrong: Share of the train labels that are replaced by another class; the setting's own
                by default.
        """
        ...


@frozen(eq=False)
class Evidence:
    """What a metric may look at.

    Args:
        scores: ``[n_train, n_test]``, positive where the train example helps.
        self_influence: ``[n_train]``, where the method has it.
        world: Data and model.
        outcomes: Trains what a metric asks for, or answers from what was trained before; None where
            no metric asks.
        attribute: Attributes with the same method for other models of the world,
            ``task -> scores [n_train, n_test]``: for metrics that compare a method with itself.
        seed: Of the metric's own random numbers: subsets and resamples.
    """

    scores: Array
    self_influence: Array | None
    world: World
    outcomes: Outcomes | None = None
    attribute: Callable[[Task], Array] | None = None
    seed: int = 0


@frozen
class MetricResult:
    """A metric's value, its interval, and what it is to be compared with.

    Args:
        value: On the whole data.
        low: Lower end of the interval.
        high: Upper end.
        chance: What scores without information give.
        confidence: How often such intervals are to hold what larger samples would give.
        ceiling: What the best scores could give, where noise bounds it; None where nothing does.
        higher_is_better: Which way is good.
        per_test: The metric of each test example, where ``value`` is their mean: what a paired test
            over test examples needs. The same examples for all scores of a world.
        bounds: Values that the metric cannot leave, infinite where it has no end; None: not said.
    """

    value: float
    low: float
    high: float
    chance: float
    confidence: float
    ceiling: float | None = None
    higher_is_better: bool = True
    per_test: tuple[float, ...] | None = field(default=None, repr=False)
    bounds: tuple[float, float] | None = field(default=None, repr=False, kw_only=True)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@runtime_checkable
class Metric(Protocol):
    """How good scores are: a frozen part; its fields say how much is asked."""

    needs: frozenset[str]
    """Of {"mislabelled", "retraining", "labels", "self-influence", "attribute"} and "fact:NAME" for
    ``World.facts[NAME] = {"train": [...], "test": [...]}``, one value for each example."""

    def measure(self, evidence: Evidence) -> MetricResult:
        """Return the value with its interval."""
        ...
