"""Dropout masks that are pure functions of a key: which features of a module stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from attrs import define, field
from torch import Tensor, nn

from dattri_core import InputError
from dattri_parts.projectors.philox import philox

UNIFORM = 3
"""Third word of the counter of uniform numbers; those below are of the entries of projectors."""
FEATURES, CHANNELS, ANY = -1, 1, 0
"""Axis of an output whose entries are dropped: the last one, that after the examples, or the second
of these for outputs of four axes and more and else the first."""


def keep_mask(key: int, length: int, rate: float) -> Tensor:
    """Return m_f = [u_f >= p] / (1 - p), ``[length]`` in float64, of mean 1 over keys.

    The mask of a shorter length is the beginning of that of a longer one.

    Args:
        key: 64 bits.
        length: Features.
        rate: p, the probability that one is dropped.
    """
    at = np.arange(-(-length // 4), dtype=np.uint64)
    zero = np.zeros_like(at)
    words = np.stack(philox((at, zero, np.full_like(at, UNIFORM), zero), key), axis=-1)
    uniform = torch.from_numpy(words.reshape(-1)[:length].astype(np.float64) / 2**32)
    return (uniform >= rate).double() / (1 - rate if rate < 1 else 1)


@define(eq=False)
class Mask:
    """A forward hook that multiplies the output of a module by a mask over one axis.

    Args:
        path: Of the module, for messages.
        key: Of the mask.
        rate: Probability that a feature is dropped.
        axis: `FEATURES`, `CHANNELS` or `ANY`.
    """

    path: str
    key: int
    rate: float
    axis: int
    _made: dict[tuple[Any, ...], Tensor] = field(factory=dict)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output without the features that are dropped."""
        if not isinstance(output, Tensor):
            raise InputError(
                f"dropout-ensemble: {type(module).__name__} at {self.path!r} gives a "
                f"{type(output).__name__}, expected a tensor; leave it out"
            )
        axis = self.axis
        if axis == ANY:
            axis = CHANNELS if output.dim() > 3 else FEATURES
        needed = 2 if axis == FEATURES else 3
        if output.dim() < needed:
            raise InputError(
                f"dropout-ensemble: {type(module).__name__} at {self.path!r} gives an output of "
                f"shape {tuple(output.shape)}, expected examples and at least {needed - 1} more "
                f"axes; leave it out with modules=['!{self.path}']"
            )
        length = output.shape[axis]
        known = (length, output.dtype, output.device)
        if known not in self._made:
            with torch.inference_mode(False):  # a tensor that autograd may save later
                mask = keep_mask(self.key, length, self.rate)
                self._made[known] = mask.to(output.device, output.dtype)
        mask = self._made[known]
        if axis == CHANNELS:
            mask = mask.reshape(-1, *[1] * (output.dim() - 2))
        return output * mask
