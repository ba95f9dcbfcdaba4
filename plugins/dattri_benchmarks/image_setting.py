"""A setting of images with classes: data, network and recipe make a `dattri_core.World`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from attrs import field, frozen
from dattri_parts.training import ModelRetraining, Optimum, Recipe
from dattri_parts.training.orders import Order
from dattri_parts.training.recipe import Length
from torch import nn

from dattri_benchmarks.finished_runs import FinishedRun, finished_run
from dattri_benchmarks.images import Array, Images, Scaling, Size, change_labels
from dattri_core import Counterfactual, InputError, Task, World

LEAST = 20
"""Examples of each side."""
TARGETS = ("loss", "margin", "correct")


@frozen
class Network:
    """A model that can be built again and again, and what to call it.

    Args:
        title: For people.
        build: Makes one, at initial weights. Its forward pass runs the same operations each time:
            on an accelerator the steps of training are recorded (`ModelRetraining`).
        threads: Of training one; None leaves them to the library. Their number shows in the last
            bits, from which a network that is not smooth goes another way.
    """

    title: str
    build: Callable[[], nn.Module]
    threads: int | None = 1


@frozen(eq=False)
class _Made:
    """What a world is made of before its network is trained."""

    train: Images
    test: Images
    given: Array
    share: float
    network: Network
    retraining: ModelRetraining


@frozen
class ImageSetting:
    """A `dattri_core.Setting` of images: a value whose parts `attrs.evolve` swaps.

    Outcomes are the loss, the margin log(p / (1 - p)) and whether the class is right. Scores are
    compared with the loss: that is what every method scores unless told otherwise. The margin is
    a falling function of it, so for each test example the ranks, and a rank correlation, are those
    of the loss mirrored.

    Args:
        name: As registered.
        title: For people, with source and licence of the data.
        sizes: (train, test) by name.
        metrics: That it is meant for, by their registered names.
        split: ``(size, seed) -> (train, test)``; refuses a size that the data do not have.
        classes: Number of classes.
        scaling: From bytes to inputs.
        network: The network for so many train images.
        recipe: How it is trained.
        damping: See `dattri_core.World`.
        path: Of an optimum, which has no run of its own: the run that leads to it, whose states are
            those of the trajectory.
        together: Networks that are trained at once.
        threads: See `dattri_core.World`.
        accelerated: Whether a CUDA device is used where there is one.
        order: In which order trainings read their examples; see `ModelRetraining`.
        length: How long trainings on a part of the train set last; see `ModelRetraining`.
        sides: What the ids of train and of test images begin with.
        fact: Name, in ``World.facts``, of what is known of each image (`Images.known`), for the
            metrics that ask for it; None: nothing is.
    """

    name: str
    title: str
    sizes: Mapping[str, Size]
    metrics: tuple[str, ...]
    split: Callable[[Size, int], tuple[Images, Images]] = field(repr=False)
    classes: int
    scaling: Scaling
    network: Callable[[int], Network] = field(repr=False)
    recipe: Recipe | Optimum
    damping: float
    path: Recipe | None = None
    together: int = 1
    threads: int | None = None
    accelerated: bool = False
    order: Order = "own"
    length: Length = "epochs"
    sides: tuple[str, str] = ("train", "test")
    fact: str | None = None

    def load(self, size: Size | None = None, seed: int = 0, wrong: float | None = None) -> World:
        """Return the world: the same numbers for the same arguments.

        A network that took long to train is kept and read back the next time, see `finished_run`.

        Args:
            size: (train, test) images; ``sizes["full"]`` by default.
            seed: Of the split, the changed labels, the initial weights and the order of training.
            wrong: Share of the train labels that are replaced by another class, from 0 to below 1;
                none by default.

        Raises:
            InputError: A size is below 20, or above what the data set has; the share or the seed is
                out of range.
        """
        made = self._made(size, seed, wrong)
        train, test, retraining = made.train, made.test, made.retraining
        whole = Counterfactual(np.ones(len(train), dtype=bool), seed)
        run, along = finished_run(retraining, whole), retraining
        if self.path is not None:
            along = attrs.evolve(retraining, recipe=self.path)
            run = _joined(finished_run(along, whole), run)
        changed = made.given != train.labels
        model = _model(made.network, run, seed, retraining.device)
        facts = {
            "data": self.title,
            "model": made.network.title,
            "n_train": len(train),
            "n_test": len(test),
            "wrong_share": made.share,
            "flipped": int(changed.sum()),
            "seed": seed,
            "device": retraining.device.type,
            "parameters": sum(p.numel() for p in model.parameters()),
            "checkpoints": list(run.epochs),
            **_accuracy(run, changed),
            **_known(self.fact, train, test),
        }
        return World(
            task=Task(model, retraining.loss, checkpoints=[run.states[-1]]),
            trajectory=Task(
                model,
                retraining.loss,
                checkpoints=list(run.states),
                learning_rates=list(run.learning_rates),
            ),
            train=retraining.train_data,
            test=retraining.test_data,
            train_ids=_ids(self.sides[0], train),
            test_ids=_ids(self.sides[1], test),
            retraining=retraining,
            target="loss",
            damping=self.damping,
            threads=self.threads,
            facts=facts,
            true_labels=train.labels.astype(np.int64),
            pictures=(self.scaling.pictures(train.images), self.scaling.pictures(test.images)),
            # The path towards an optimum ends short of it: no run of the task's model.
            steps=(
                None
                if self.path is not None
                else lambda: Task(model, retraining.loss, checkpoints=retraining.steps(whole))
            ),
        )

    def retraining(
        self, size: Size | None = None, seed: int = 0, wrong: float | None = None
    ) -> ModelRetraining:
        """Return that of the world of the same arguments, without training its network.

        Raises:
            InputError: As `load` does.
        """
        return self._made(size, seed, wrong).retraining

    def _made(self, size: Size | None, seed: int, wrong: float | None) -> _Made:
        size = self._size(self.sizes["full"] if size is None else size)
        share = self._share(0.0 if wrong is None else wrong)
        Counterfactual(np.ones(1, dtype=bool), seed)  # refused before anything is read
        train, test = self.split(size, seed)
        given = change_labels(train.labels, self.classes, share, seed)
        network = self.network(size[0])
        retraining = self._retraining(network, (train, given), (test, test.labels))
        return _Made(train, test, given, share, network, retraining)

    def _retraining(self, network: Network, *parts: tuple[Images, Array]) -> ModelRetraining:
        train, test = (
            (self.scaling.inputs(images.images), torch.from_numpy(labels.astype(np.int64)))
            for images, labels in parts
        )
        cuda = self.accelerated and torch.cuda.is_available()
        return ModelRetraining(
            build=network.build,
            recipe=self.recipe,
            loss="cross-entropy",
            train_data=train,
            test_data=test,
            targets=TARGETS,
            about={"setting": self.name, "network": network.title},
            together=self.together,
            device="cuda" if cuda else "cpu",
            threads=network.threads,
            recorded=cuda,
            order=self.order,
            length=self.length,
        )

    def _size(self, size: Any) -> Size:
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

    def _share(self, wrong: Any) -> float:
        if not isinstance(wrong, (int, float)) or not 0 <= wrong < 1:
            raise InputError(
                f"setting {self.name!r}: wrong is {wrong!r}, expected the share of train labels to "
                "change, from 0 to below 1"
            )
        return float(wrong)


def _joined(path: FinishedRun, optimum: FinishedRun) -> FinishedRun:
    """Return the run that leads to an optimum, with the optimum as its end."""
    return attrs.evolve(
        path,
        states=(*path.states[:-1], optimum.states[-1]),
        train_correct=optimum.train_correct,
        test_correct=optimum.test_correct,
    )


def _model(network: Network, run: FinishedRun, seed: int, device: torch.device) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network.build()
    model.load_state_dict(run.states[-1])
    return model.to(device).eval()


def _accuracy(run: FinishedRun, flipped: Array) -> dict[str, float | None]:
    """Return shares of labels that are fitted; of the changed ones None where there are none."""
    fitted = run.train_correct.numpy()
    return {
        "test_accuracy": float(run.test_correct.numpy().mean()),
        "train_accuracy": float(fitted.mean()),
        "flipped_fitted": float(fitted[flipped].mean()) if flipped.any() else None,
    }


def _known(fact: str | None, train: Images, test: Images) -> dict[str, dict[str, list[Any]]]:
    if fact is None or train.known is None or test.known is None:
        return {}
    return {fact: {"train": train.known.tolist(), "test": test.known.tolist()}}


def _ids(side: str, images: Images) -> tuple[str, ...]:
    return tuple(f"{side}-{i}" for i in images.index)
