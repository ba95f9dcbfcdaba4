"""How much numbers change by rounding alone, in the precision that a model really computes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dattri_core.batch import tensors_of
from dattri_core.dispatched import DispatchMode, run_under

DRAWS = 4
"""Of changes of the weights; one alone may leave a number where it is by chance."""
TIMES = 8
"""What the largest change is multiplied by, for the roundings of a whole forward pass."""


TF32 = 2.0**-10
"""The epsilon of products of float32 numbers on a device, where they may be rounded."""


class _Coarsest(DispatchMode):
    """Sees the floating point dtype of fewest digits that an operation returns."""

    def __init__(self, tf32: bool) -> None:
        super().__init__()
        self.epsilon = 0.0
        self.tf32 = tf32

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tensors_of(found):
            if tensor.is_floating_point():
                self.epsilon = max(self.epsilon, _epsilon(tensor, self.tf32))
        return found


def coarsest(run: Callable[[], Any], *, tf32: bool = True) -> float:
    """Return the epsilon of the dtype of fewest digits in a computation.

    Operators that torch shows to nobody, such as ``flex_attention``, end the looking.

    Args:
        run: The computation.
        tf32: Whether numbers in float32 count as TF32 where a device may multiply them so.
    """
    seen = _Coarsest(tf32)
    run_under(seen, run)
    return seen.epsilon


def _epsilon(tensor: Tensor, tf32: bool) -> float:
    own: float = torch.finfo(tensor.dtype).eps
    rounded = tf32 and tensor.is_cuda and tensor.dtype == torch.float32 and _tf32()
    return max(own, TF32) if rounded else own


def _tf32() -> bool:
    """Return whether products in float32 may be rounded on a device; convolutions are at first."""
    try:
        return torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by the newer names, beside which the older ones cannot be read
        return True


def rounding_of(
    values: Callable[[Mapping[str, Tensor] | None], Tensor], parameters: Mapping[str, Tensor]
) -> Tensor:
    """Return up to what a difference of each value may be rounding.

    A loss in float32 may be that of a model in bfloat16, and one near 0 the difference of large
    logits; neither its dtype nor its size says how many digits it has. So weights are multiplied by
    1 +- epsilon of the coarsest dtype in the forward pass, and the largest change counts.

    Args:
        values: Of weights by name, or of those that the model has, ``[B]``; not random.
        parameters: The weights.

    Returns:
        ``[B]``.
    """
    epsilon = coarsest(lambda: values(None))
    first = values(None)
    largest = torch.zeros_like(first)
    for draw in range(DRAWS):
        moved = {
            name: _moved(value, epsilon, draw)
            for name, value in parameters.items()
            if value.is_floating_point()
        }
        largest = torch.maximum(largest, (values(moved) - first).abs())
    return TIMES * largest


def _moved(value: Tensor, epsilon: float, draw: int) -> Tensor:
    generator = torch.Generator(value.device).manual_seed(draw)
    signs = torch.randint(0, 2, value.shape, generator=generator, device=value.device)
    return value * (1 + epsilon * (2 * signs - 1)).to(value.dtype)
