"""What a process has once, and a part must leave as it is: random generators and settings."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch

SEEDS = count(987654321)


@contextmanager
def settings_kept() -> Iterator[None]:
    """Put torch's settings back at the end: what one part leaves behind meets no other part."""
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        if torch.are_deterministic_algorithms_enabled() != deterministic:  # it loads a compiler
            torch.use_deterministic_algorithms(deterministic)


@contextmanager
def watched() -> Iterator[Callable[[], list[str]]]:
    """Yield a function that names what has changed; at the end all is as it was before.

    Generators are in another state each time, so that one that is seeded to what it was shows.
    """
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - the global state must stay
    plain_state = random.getstate()
    with settings_kept(), torch.random.fork_rng(devices=[]):
        try:
            seed = next(SEEDS)
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            before = _seen()
            yield lambda: [name for name, value in _seen().items() if value != before[name]]
        finally:
            random.setstate(plain_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _seen() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    return {
        "torch's random generator": torch.get_rng_state().tolist(),
        "NumPy's random generator": [*numpy_state[1].tolist(), numpy_state[2]],
        "Python's random generator": random.getstate(),
        "torch's default dtype": torch.get_default_dtype(),
        "whether gradients are recorded": torch.is_grad_enabled(),
        "whether algorithms are deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def unchanged(changed: list[str], what: str) -> tuple[bool, str]:
    """Return whether nothing has changed, and what to say where something has."""
    fix = "take numbers from a generator of its own, and put back what it sets"
    return not changed, f"{what} changes {', '.join(changed)}, expected none; {fix}"
