"""Images with classes: what is read from a data set, how a split is drawn, and changed labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from dattri_core import InputError

Array = np.ndarray[Any, Any]
Size = tuple[int, int]


@frozen(eq=False)
class Images:
    """Images as bytes ``[n, height, width]``, or ``[n, height, width, 3]`` in colour.

    Args:
        images: Of bytes; in grey 0 is background.
        labels: ``[n]`` bytes.
        index: ``[n]``, positions in the official order of the data set.
        known: ``[n]``, what else is known of each and not told to the model; None: nothing.
    """

    images: Array
    labels: Array
    index: Array
    known: Array | None = None

    def __getitem__(self, chosen: Array) -> Images:
        known = None if self.known is None else self.known[chosen]
        return Images(self.images[chosen], self.labels[chosen], self.index[chosen], known)

    def __len__(self) -> int:
        return len(self.labels)


@frozen
class Scaling:
    """Bytes to inputs: ``(byte / brightest - mean) / deviation`` in float32.

    Args:
        brightest: The largest byte of the data set.
        mean: For each channel; of the whole official train set.
        deviation: The same.
    """

    brightest: int
    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)

    def inputs(self, images: Array) -> Tensor:
        """Return ``[n, height, width]``, or ``[n, 3, height, width]`` of images in colour."""
        mean, deviation = (np.array(x, np.float32) for x in (self.mean, self.deviation))
        scaled = (images / np.float32(self.brightest) - mean) / deviation
        if scaled.ndim == 4:
            scaled = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
        return torch.from_numpy(scaled)

    def pictures(self, images: Array) -> Array:
        """Return bytes of 0 to 255."""
        return (images.astype(np.uint16) * 255 // self.brightest).astype(np.uint8)


def draw(pool: Images, count: int, stream: list[int], what: str) -> Images:
    """Return ``count`` images of a pool, in a random order that the stream alone decides.

    Args:
        pool: To choose from.
        count: Of images; with more of them come the same first ones.
        stream: Of the random numbers.
        what: Named in the error.

    Raises:
        InputError: The pool has fewer.
    """
    if count > len(pool):
        raise InputError(f"{what}: {count} are asked for, and there are {len(pool)}")
    return pool[np.random.default_rng(stream).permutation(len(pool))[:count]]


def change_labels(labels: Array, classes: int, share: float, seed: int) -> Array:
    """Return labels of which a share is replaced by another class.

    ``round(share * n)`` examples are drawn without replacement, and each gets one of the other
    classes with equal chance.
    """
    random = np.random.default_rng([seed, 1])
    chosen = random.choice(len(labels), size=round(share * len(labels)), replace=False)
    changed = labels.copy()
    changed[chosen] = (labels[chosen] + random.integers(1, classes, len(chosen))) % classes
    return changed
