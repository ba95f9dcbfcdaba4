"""Arithmetic at the precision that is promised, whatever surrounds the call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
DEVICES = ("cpu", "cuda")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Leave out a `torch.autocast` that surrounds the block, with a warning.

    It would round products of rows and of curvature matrices to half precision, where damping is
    lost. A model that is to run in half precision does so by an autocast of its own, in ``forward``
    or in the loss.
    """
    on = [device for device in DEVICES if torch.is_autocast_enabled(device)]
    if on:
        warnings.warn(
            "dattri: called inside torch.autocast, which is left out: it would round inner "
            "products and curvatures to half precision; to run the model in half precision, "
            "give a loss or a model that has torch.autocast inside",
            RuntimeWarning,
            stacklevel=4,
        )
    with ExitStack() as stack:
        for device in on:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def exactly(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function as it is outside of `torch.autocast`; see `without_autocast`."""

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        with without_autocast():
            return function(*args, **kwargs)

    return outside
