"""Digits: 1797 real images of 8 x 8 pixels that come with the package.

Data: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, doi 10.24432/C50P49, CC BY 4.0.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from dattri_parts.training import Recipe
from torch import nn

from dattri_benchmarks.image_setting import ImageSetting, Network
from dattri_benchmarks.images import Array, Images, Scaling, Size, draw
from dattri_benchmarks.models import mlp

SHA256 = "b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e"
"""Of data/digits.npz."""
SIZE = (1437, 200)
RECIPE = Recipe(
    epochs=300,
    batch=200,
    learning_rate=0.3,
    weight_decay=5e-3,
    momentum=0.9,
    keep=(2, 8, 25, 80, 160, 300),
)
DAMPING = 1e-2
"""Twice the weight decay, so that H + damping I is positive: see `dattri_core.World`."""


def read_digits() -> tuple[Array, Array]:
    """Return images ``[1797, 8, 8]`` of 0 to 16 and labels ``[1797]``, both bytes."""
    path = files("dattri_benchmarks").joinpath("data", "digits.npz")
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as found:
        return found["images"], found["labels"]


def _split(size: Size, seed: int) -> tuple[Images, Images]:
    images, labels = read_digits()
    pool = Images(images, labels, np.arange(len(labels)))
    both = draw(pool, sum(size), [seed, 0], "setting 'digits': train and test images together")
    border = np.arange(len(both)) < size[0]
    return both[border], both[~border]


setting = ImageSetting(
    name="digits",
    title="Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, UCI, CC BY 4.0)",
    sizes={"full": SIZE, "small": SIZE},
    metrics=("loo-pearson", "lds", "mislabel-auroc"),
    split=_split,
    classes=10,
    scaling=Scaling(16),
    network=lambda n: Network("MLP 64-24-10, tanh", lambda: mlp(64, 24, 10, activation=nn.Tanh)),
    recipe=RECIPE,
    damping=DAMPING,
    together=64,
    threads=1,
    sides=("digit", "digit"),
)
"""The embedded data set with a network of 1,810 parameters."""
