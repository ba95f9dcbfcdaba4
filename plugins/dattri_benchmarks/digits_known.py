"""Digits of which more is known than the model is told: subclasses, a shortcut, two sources.

The facts behind metrics that need no training again: an attribution of a test image should point at
train images of its own kind. Settings made of the embedded data, by `attrs.evolve` of ``digits``.

Source: Hanawa et al. 2021, arXiv 2006.04528 (subclasses); Yolcu et al. 2025, arXiv 2410.07158
(shortcuts and mixed sources).
"""

from __future__ import annotations

import math

import attrs
import numpy as np
from torch import nn

from dattri_benchmarks.digits import setting as digits
from dattri_benchmarks.image_setting import Network
from dattri_benchmarks.images import Array, Images, Size
from dattri_benchmarks.models import mlp

MARKED, MARKED_SHARE, SIDE = 8, 0.9, 3
"""The digit whose train images bear the mark, the share of them that do, pixels of a side."""
INK = 16
"""The brightest byte."""


def _parity(images: Images) -> Images:
    return attrs.evolve(
        images, labels=(images.labels % 2).astype(images.labels.dtype), known=images.labels
    )


def _split_parity(size: Size, seed: int) -> tuple[Images, Images]:
    train, test = digits.split(size, seed)
    return _parity(train), _parity(test)


def _marked(images: Images, chosen: Array) -> Images:
    """Return the images with ink in a corner of those that are chosen; known are those of an 8."""
    pixels = images.images.copy()
    pixels[chosen, :SIDE, :SIDE] = INK
    return attrs.evolve(images, images=pixels, known=chosen & (images.labels == MARKED))


def _split_marked(size: Size, seed: int) -> tuple[Images, Images]:
    """Mark most train images of one digit, and every second test image whatever it shows.

    The tests to ask about are those where the mark helps: marked images of the digit itself. It is
    the loss that is attributed, and on other digits the marked train images do harm.
    """
    train, test = digits.split(size, seed)
    places = np.flatnonzero(train.labels == MARKED)
    chosen = np.zeros(len(train), np.bool_)
    chosen[places[: math.ceil(MARKED_SHARE * len(places))]] = True
    return _marked(train, chosen), _marked(test, np.arange(len(test)) % 2 == 0)


def _mixed(images: Images) -> Images:
    """Return the images, every second one as a negative."""
    negative = np.arange(len(images)) % 2 == 1
    pixels = images.images.copy()
    pixels[negative] = INK - pixels[negative]
    return attrs.evolve(images, images=pixels, known=np.where(negative, "negative", "positive"))


def _split_mixed(size: Size, seed: int) -> tuple[Images, Images]:
    train, test = digits.split(size, seed)
    return _mixed(train), _mixed(test)


parity_setting = attrs.evolve(
    digits,
    name="digits-parity",
    metrics=("subclass-detection", "class-detection", "lds"),
    split=_split_parity,
    classes=2,
    network=lambda n: Network("MLP 64-24-2, tanh", lambda: mlp(64, 24, 2, activation=nn.Tanh)),
    fact="subclasses",
)
"""Odd or even; the digit is the subclass."""

marked_setting = attrs.evolve(
    digits,
    name="digits-marked",
    metrics=("shortcut-detection", "class-detection", "lds"),
    split=_split_marked,
    fact="shortcut",
)
"""A mark in the corner that says 8 in the train set and nothing in the test set."""

mixed_setting = attrs.evolve(
    digits,
    name="digits-mixed",
    metrics=("mixed-source-detection", "class-detection", "lds"),
    split=_split_mixed,
    fact="sources",
)
"""Half of the images are negatives, ink on a dark ground: another source."""
