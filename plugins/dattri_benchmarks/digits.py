"""Digits: 1797 real images of 8 x 8 pixels that come with the package; 5 % of train labels flipped.

Data: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, doi 10.24432/C50P49, CC BY 4.0.
"""

from __future__ import annotations

from functools import partial
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from dattri_parts.training import Recipe
from torch import nn

from dattri_benchmarks.models import mlp
from dattri_benchmarks.setting import (
    Setting,
    Size,
    World,
    flip_labels,
    make_world,
    train_on_all,
)
from dattri_core import InputError

Array = np.ndarray[Any, Any]
SHA256 = "b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e"
"""Of data/digits.npz."""
WRONG = 0.05
RECIPE = Recipe(
    epochs=300,
    batch=200,
    learning_rate=0.3,
    weight_decay=5e-3,
    momentum=0.9,
    keep=(2, 8, 25, 80, 160, 300),
)
DAMPING = 1e-2
"""Twice the weight decay, so that H + damping I is positive: see `World.damping`."""


def read_digits() -> tuple[Array, Array]:
    """Return images ``[1797, 8, 8]`` of 0 to 16 and labels ``[1797]``, both bytes."""
    path = files("dattri_benchmarks").joinpath("data", "digits.npz")
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as found:
        return found["images"], found["labels"]


def _build(size: Size, seed: int) -> World:
    images, labels = read_digits()
    n_train, n_test = size
    if n_train + n_test > len(labels):
        raise InputError(
            f"setting 'digits': {n_train} train and {n_test} test examples are more than the "
            f"{len(labels)} images there are"
        )
    order = np.random.default_rng([seed, 0]).permutation(len(labels))
    train, test = order[:n_train], order[n_train : n_train + n_test]
    given, _ = flip_labels(labels[train], 10, WRONG, seed)
    inputs = [torch.from_numpy(images[index] / np.float32(16)) for index in (train, test)]
    build = partial(mlp, 64, 24, 10, activation=nn.Tanh)
    run = train_on_all(build, RECIPE, (inputs[0], inputs[1]), (given, labels[test]), seed)
    pictures = [
        (images[index].astype(np.uint16) * 255 // 16).astype(np.uint8) for index in (train, test)
    ]
    return make_world(
        run,
        (inputs[0], inputs[1]),
        (given, labels[test]),
        (pictures[0], pictures[1]),
        (tuple(f"digit-{i}" for i in train), tuple(f"digit-{i}" for i in test)),
        labels[train],
        DAMPING,
        1,
        {"data": setting.title, "model": "MLP 64-24-10, tanh", "wrong_share": WRONG, "seed": seed},
    )


setting = Setting(
    name="digits",
    title="Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, UCI, CC BY 4.0)",
    size=(1437, 200),
    build=_build,
)
"""The embedded data set with a network of 1,810 parameters."""
