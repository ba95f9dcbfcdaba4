"""MNIST (LeCun, Cortes and Burges): images of 28 x 28 pixels, 5 % of train labels flipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from dattri_parts.training import Recipe

from dattri_benchmarks.fetch import Download, data_folder, fetch
from dattri_benchmarks.models import mnist_mlp
from dattri_benchmarks.setting import (
    Setting,
    Size,
    World,
    flip_labels,
    make_world,
    train_on_all,
)
from dattri_core import InputError, StoreError

Array = np.ndarray[Any, Any]
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
SHA256 = {  # of the decompressed files
    "t10k-images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "train-images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
}
WRONG = 0.05
RECIPE = Recipe(
    epochs=100,
    batch=200,
    learning_rate=0.1,
    weight_decay=2e-2,
    momentum=0.9,
    keep=(1, 3, 10, 30, 60, 100),
)
DAMPING = 0.1
"""Five times the weight decay: a ReLU network's Hessian dips to about -0.05 here."""
MEAN, DEVIATION = 0.1307, 0.3081  # of the 60,000 train images, scaled to [0, 1]


def read_mnist(part: str) -> tuple[Array, Array]:
    """Return the images ``[n, 28, 28]`` and labels ``[n]`` of ``"train"`` or ``"t10k"``, as bytes.

    Read from ``mnist/`` below the folder of data (see `data_folder`), downloaded when missing.
    """
    return _read(f"{part}-images", 3), _read(f"{part}-labels", 1)


def _read(what: str, axes: int) -> Array:
    name = f"{what}-idx{axes}-ubyte.gz"
    download = Download(name, [mirror + name for mirror in MIRRORS], SHA256[what])
    content = fetch(download, data_folder() / "mnist")
    # IDX: two zero bytes, 8 for unsigned bytes, the number of axes, their lengths, the numbers
    header = np.frombuffer(content[: 4 + 4 * axes], dtype=">u4")
    shape = tuple(int(length) for length in header[1:])
    if int(header[0]) != 0x0800 + axes or len(content) != 4 + 4 * axes + int(np.prod(shape)):
        raise StoreError(f"data file {name!r}: not an IDX file of bytes with {axes} axes")
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


def _build(size: Size, seed: int) -> World:
    parts, chosen = [], []
    for number, (part, count) in enumerate(zip(("train", "t10k"), size, strict=True)):
        images, labels = read_mnist(part)
        if count > len(labels):
            raise InputError(
                f"setting 'mnist': {count} {part} examples, and there are {len(labels)}"
            )
        index = np.random.default_rng([seed, 2 + number]).permutation(len(labels))[:count]
        parts.append((images[index], labels[index]))
        chosen.append(index)
    (train_images, train_labels), (test_images, test_labels) = parts
    given, _ = flip_labels(train_labels, 10, WRONG, seed)
    inputs = [
        torch.from_numpy(((images / np.float32(255)) - np.float32(MEAN)) / np.float32(DEVIATION))
        for images in (train_images, test_images)
    ]
    run = train_on_all(mnist_mlp, RECIPE, (inputs[0], inputs[1]), (given, test_labels), seed)
    return make_world(
        run,
        (inputs[0], inputs[1]),
        (given, test_labels),
        (train_images, test_images),
        (tuple(f"train-{i}" for i in chosen[0]), tuple(f"test-{i}" for i in chosen[1])),
        train_labels,
        DAMPING,
        None,
        {"data": setting.title, "model": "MLP 784-128-64-10", "wrong_share": WRONG, "seed": seed},
    )


setting = Setting(
    name="mnist",
    title="MNIST (LeCun, Cortes and Burges 1998, CC BY-SA 3.0)",
    size=(2000, 100),
    build=_build,
)
"""Real MNIST with the network of 109,386 parameters."""
