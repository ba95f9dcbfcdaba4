"""CIFAR-10 (Krizhevsky 2009): subsets of its images of 32 x 32 pixels, and settings of ResNet-9.

A subset has the first images of each of its classes.

No licence is stated; for research, with the citation. Nothing of it comes with the package.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import attrs
import numpy as np
from attrs import frozen
from dattri_parts.training import Recipe
from torch import nn

from dattri_benchmarks.fetch import Download, data_folder, fetch
from dattri_benchmarks.image_setting import ImageSetting, Network
from dattri_benchmarks.images import Array, Images, Scaling, Size, draw
from dattri_benchmarks.models import group_norm, resnet9
from dattri_core import StoreError

Name = Literal["cifar2", "cifar10"]
TITLE = "images of CIFAR-10 (Krizhevsky 2009, no licence stated, for research)"
ARCHIVE = Download(
    "cifar-10-binary.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    unpack=False,
)
"""The binary version, records of a label and 3 x 32 x 32 bytes: the Python one holds pickles."""
RECORDS = 10_000  # in a file of the archive
PIXELS = 3 * 32 * 32


@frozen
class Subset:
    """The first train and test images of some classes, in the official order.

    Args:
        name: Of its file, below the folder of data.
        classes: Official numbers; label k is the k-th of them.
        train: Images of each class.
        test: Images of each class.
        sha256: Of the arrays' bytes, see `_digest`; the same from either file.
    """

    name: str
    classes: tuple[int, ...]
    train: int
    test: int
    sha256: str


SUBSETS = {
    "cifar2": Subset(
        "cifar2_catdog_5000_500.npz",
        (3, 5),
        2500,
        250,
        "68662d15170d6abb73fbcd31856c4dda7cc2ec9ad6d09ab8091bdceaa6a0a646",
    ),
    "cifar10": Subset(
        "cifar10_5000_1000.npz",
        tuple(range(10)),
        500,
        100,
        "2bee590407070b9dcf239ad471628b33e3e88b60960fe62880e50b58aa9ede82",
    ),
}
"""``cifar2``: 2500 + 250 cats (0) and as many dogs (1); ``cifar10``: 500 + 100 of each class."""


def read_cifar(name: Name) -> tuple[Images, Images]:
    """Return the train and the test images of a subset.

    Read from ``cifar/`` below the folder of data (see `data_folder`): from the subset's own file
    when it is there, else from the official archive, downloaded when missing (162 MB). Both give
    the same arrays, which is checked.

    Raises:
        StoreError: A file is truncated or holds something else.
        InputError: Neither is there, and the archive cannot be downloaded.
    """
    subset = SUBSETS[name]
    folder = data_folder() / "cifar"
    path = folder / subset.name
    if path.exists():
        parts, source = _from_file(path), str(path)
    else:
        parts, source = _from_archive(subset, fetch(ARCHIVE, folder)), ARCHIVE.name
    found = _digest(parts)
    if found != subset.sha256:
        raise StoreError(
            f"data file {source!r}: its arrays have the SHA-256 {found}, expected {subset.sha256}; "
            "delete it to have the official archive read instead"
        )
    return parts


def _from_file(path: Path) -> tuple[Images, Images]:
    try:
        with np.load(path, allow_pickle=False) as found:
            train, test = (
                Images(*(found[f"{what}_{part}"] for what in ("x", "y", "idx")))
                for part in ("train", "test")
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"data file {str(path)!r}: not an .npz file with the arrays x, y and idx of train and "
            f"test ({error}); delete it to have the official archive read instead"
        ) from error
    return train, test


def _from_archive(subset: Subset, content: bytes) -> tuple[Images, Images]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        names = [f"data_batch_{number}" for number in range(1, 6)]
        train = np.concatenate([_records(archive, name) for name in names])
        test = _records(archive, "test_batch")
    return _first(train, subset.classes, subset.train), _first(test, subset.classes, subset.test)


def _records(archive: tarfile.TarFile, name: str) -> Array:
    member = f"cifar-10-batches-bin/{name}.bin"
    handle = archive.extractfile(member)
    content = handle.read() if handle is not None else b""
    if len(content) != RECORDS * (1 + PIXELS):
        raise StoreError(
            f"data file {ARCHIVE.name!r}: {member!r} has {len(content)} bytes, expected "
            f"{RECORDS * (1 + PIXELS)}"
        )
    return np.frombuffer(content, np.uint8).reshape(RECORDS, 1 + PIXELS)


def _first(records: Array, classes: tuple[int, ...], count: int) -> Images:
    """Return the first ``count`` records of each class, in their own order."""
    given = records[:, 0]
    index = np.sort(np.concatenate([np.flatnonzero(given == c)[:count] for c in classes]))
    chosen = records[index]
    images = chosen[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # channels last
    return Images(images, np.searchsorted(classes, chosen[:, 0]).astype(np.uint8), index)


def _digest(parts: tuple[Images, Images]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(np.ascontiguousarray(part.images, np.uint8).tobytes())
        total.update(part.labels.astype(np.uint8).tobytes())
        total.update(part.index.astype("<i4").tobytes())
    return total.hexdigest()


SCALING = Scaling(255, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
RECIPE = Recipe(
    epochs=20,
    batch=50,
    learning_rate=0.05,
    weight_decay=5e-3,
    momentum=0.9,
    warmup=100,
    keep=(1, 2, 5, 10, 15, 20),
)
DAMPING = 3e-2
"""Six times the weight decay, as for the MLP on MNIST; not measured for this network."""
FEW = 1000
"""Train images up to which the network is small: the whole one is slow without an accelerator."""


def _resnet9(classes: int) -> Callable[[int], Network]:
    """Return the network for so many train images.

    Up to `FEW` it has an eighth of the width and sees 16 x 16 pixels, the means of four: a step on
    an image costs about a seventieth.
    """

    def few() -> nn.Module:
        return nn.Sequential(nn.AvgPool2d(2), *resnet9(classes, 8, group_norm))

    def many() -> nn.Module:
        return resnet9(classes, 64, group_norm)

    def network(n_train: int) -> Network:
        if n_train <= FEW:
            return Network("ResNet-9 of width 8 on 16 x 16 pixels, group norm", few)
        return Network("ResNet-9 of width 64, group norm", many, threads=None)

    return network


def _split(name: Name) -> Callable[[Size, int], tuple[Images, Images]]:
    def split(size: Size, seed: int) -> tuple[Images, Images]:
        train, test = (
            draw(pool, count, [seed, 2 + number], f"setting '{name}-resnet9': {side} images")
            for number, (pool, count, side) in enumerate(
                zip(read_cifar(name), size, ("train", "test"), strict=True)
            )
        )
        return train, test

    return split


cifar2_setting = ImageSetting(
    name="cifar2-resnet9",
    title=f"CIFAR-2, cats and dogs: {TITLE}",
    sizes={"full": (5000, 500), "small": (400, 100)},
    metrics=("lds", "mislabel-auroc"),
    split=_split("cifar2"),
    classes=2,
    scaling=SCALING,
    network=_resnet9(2),
    recipe=RECIPE,
    damping=DAMPING,
    accelerated=True,
)
"""Cats and dogs with ResNet-9.

Group norm stands where the published network has batch norm. Batch norm in training makes the loss
of an example depend on the others of its batch, so that there is no loss of one example that was
minimised, the state where training ends is no stationary point of the loss that is attributed, and
a train set of another size also has another estimate of the statistics. Images are not changed at
random: an example is then the same one in every epoch and every training.
"""

cifar10_setting = attrs.evolve(
    cifar2_setting,
    name="cifar10-resnet9",
    title=f"500 and 100 of each class: {TITLE}",
    metrics=("mislabel-auroc",),
    split=_split("cifar10"),
    classes=10,
    network=_resnet9(10),
)
"""All ten classes with the same network."""
