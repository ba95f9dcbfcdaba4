"""MNIST (LeCun, Cortes and Burges): images of 28 x 28 pixels, and settings made of them."""

from __future__ import annotations

import attrs
import numpy as np
from dattri_parts.training import Optimum, Recipe

from dattri_benchmarks.fetch import Download, data_folder, fetch
from dattri_benchmarks.image_setting import ImageSetting, Network
from dattri_benchmarks.images import Array, Images, Scaling, Size, draw
from dattri_benchmarks.models import mnist_logistic_regression, mnist_mlp
from dattri_core import StoreError

TITLE = "MNIST (LeCun, Cortes and Burges 1998, CC BY-SA 3.0)"
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
SIZES = {"full": (5000, 500), "small": (1000, 100)}
SCALING = Scaling(255, (0.1307,), (0.3081,))
L2 = 1e-2
"""Of logistic regression: the one of 0.1, 0.03, 0.01, 0.003 and 0.001 with which 5000 images give
the highest accuracy on others, 0.90."""
SGD_RECIPE = Recipe(
    epochs=20,
    batch=32,
    learning_rate=0.01,
    schedule="constant",
    keep=tuple(range(2, 21, 2)),
)
"""That of dattri 0.3.0's benchmark of MNIST with logistic regression: plain steps, no penalty."""
SGD_DAMPING = 3e-2
"""1 / (20 epochs x 157 steps x 0.01): stopping after steps of a total length t acts on a quadratic
loss much as a penalty of weight 1 / t does (Ali, Kolter and Tibshirani 2019, arXiv 1810.10082)."""
MLP_RECIPE = Recipe(
    epochs=20,
    batch=100,
    learning_rate=0.05,
    weight_decay=5e-3,
    momentum=0.9,
    keep=(1, 2, 4, 8, 14, 20),
)
"""The weight decay leaves a loss at which models of other seeds agree on what subsets do."""
MLP_DAMPING = 3e-2
"""The Hessian of the train loss goes down to -0.019 with 1000 images and -0.011 with 5000."""


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


def _split(size: Size, seed: int) -> tuple[Images, Images]:
    sides = []
    for number, (part, count) in enumerate(zip(("train", "t10k"), size, strict=True)):
        images, labels = read_mnist(part)
        pool = Images(images, labels, np.arange(len(labels)))
        sides.append(draw(pool, count, [seed, 2 + number], f"MNIST, {part} images"))
    return sides[0], sides[1]


lr_setting = ImageSetting(
    name="mnist-lr",
    title=TITLE,
    sizes=SIZES,
    metrics=("loo-pearson", "loo-spearman", "lds", "mislabel-auroc"),
    split=_split,
    classes=10,
    scaling=SCALING,
    network=lambda n: Network("logistic regression 784-10", mnist_logistic_regression),
    recipe=Optimum(L2),
    damping=L2,
    path=Recipe(
        epochs=30,
        batch=100,
        learning_rate=2e-2,
        weight_decay=L2,
        momentum=0.9,
        keep=(1, 2, 4, 8, 15, 30),
    ),
    together=50,
)
"""MNIST with multinomial logistic regression (7,850 parameters), trained to its one optimum.

The damping is the weight of the penalty: H + damping I is the Hessian of what is minimised, so an
exact influence function is the first order of leaving an example out.
"""

lr_sgd_setting = attrs.evolve(
    lr_setting,
    name="mnist-lr-sgd",
    recipe=SGD_RECIPE,
    damping=SGD_DAMPING,
    path=None,
    order="shared",
)
"""The same model as published benchmarks of dattri train it: stopped far from an optimum.

These read the examples in the order of the data set, so that a model without an example differs by
the example; here in the shuffled order that all models of a seed share.
"""

mlp_setting = attrs.evolve(
    lr_setting,
    name="mnist-mlp",
    network=lambda n: Network("MLP 784-128-64-10", mnist_mlp),
    recipe=MLP_RECIPE,
    damping=MLP_DAMPING,
    path=None,
)
"""MNIST with the network of 109,386 parameters."""
