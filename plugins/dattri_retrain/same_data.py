"""Whether the examples that are asked about are those that a retraining holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dattri_core import Examples, InputError, map_tensors, take

ROWS = 1024
CLOSE = 1e-5
"""Relative difference of numbers that are the same in another precision."""


def tensors_held(data: Any) -> list[Tensor]:
    """Return the tensors of a nest, none of anything else."""
    found: list[Tensor] = []
    map_tensors(found.append, data)
    return found


def require_same(name: str, side: str, given: Examples, held: Any, fix: str) -> None:
    """Refuse examples that are others than a retraining's, or in another order.

    Numbers may be of another precision, and axes of length 1 more or fewer. What a retraining holds
    is compared where it is a nest of tensors; of others only the number of examples is known.

    Args:
        name: Of the method, for messages.
        side: ``"train"`` or ``"test"``, for messages.
        given: What is attributed; as many examples as are held.
        held: The same side of the retraining.
        fix: What to do, for messages.

    Raises:
        InputError: An example differs, or all of them have other shapes.
    """
    if not tensors_held(held):
        return
    for positions, batch in given.batches(ROWS):
        start = int(positions[0])
        ours = tensors_held(batch)
        theirs = tensors_held(take(held, slice(start, start + len(positions))))
        if [_sizes(t) for t in ours] != [_sizes(t) for t in theirs]:
            raise InputError(
                f"{name}: the {side} data are tensors of shapes {_shapes(ours)}, and those that "
                f"the retraining holds of shapes {_shapes(theirs)}, for {len(positions)} "
                f"examples; {fix}"
            )
        differs = torch.zeros(len(positions), dtype=torch.bool)
        for one, other in zip(ours, theirs, strict=True):
            differs |= ~_same(one.detach().cpu(), other.detach().cpu())
        if differs.any():
            raise InputError(
                f"{name}: {side} example {start + int(differs.nonzero()[0])} is not that of the "
                f"retraining, so scores would be of other examples than they say; {fix}"
            )


def _same(one: Tensor, other: Tensor) -> Tensor:
    """Return which examples are the same, ``[B]``."""
    one, other = one.reshape(len(one), -1), other.reshape(len(other), -1)
    if not one.is_floating_point() and not other.is_floating_point():
        return (one == other).all(1)
    coarse = min(
        (t.dtype for t in (one, other) if t.is_floating_point()),
        key=lambda dtype: -torch.finfo(dtype).eps,
    )
    one, other = one.to(coarse).double(), other.to(coarse).double()
    # Numbers of any unit: what is rounding beside 1 may be all that small ones say.
    size = min(1.0, float(other.abs().nan_to_num(0.0, 0.0).max())) if other.numel() else 1.0
    return torch.isclose(one, other, rtol=CLOSE, atol=CLOSE / 10 * size, equal_nan=True).all(1)


def _sizes(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape[1:] if size != 1]


def _shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]
