"""Passes under a dispatch mode, which sees what torch computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that sees what torch computes, for which torch loads no compiler.

    Torch keeps Dynamo out of the frames of a mode, which loads all of it: more than a second in a
    process that compiles nothing, and microseconds for every operation. Models that are compiled
    run as they were written here (`Evaluator.session`), so that there is no Dynamo to be kept out.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Answer torch, where it asks for this name; older releases wrap no mode."""
        return False


def run_under(mode: TorchDispatchMode, run: Callable[[], object]) -> bool:
    """Run a computation under a mode; return whether torch showed it all of its operations.

    Operators of higher order, such as ``flex_attention``, go to no mode that does not know them:
    the computation ends there, and what Dynamo had begun to compile for it is forgotten, else it
    would fail without the mode too.

    Args:
        mode: Sees the operations.
        run: The computation; its result is not returned.
    """
    try:
        with mode:
            run()
    except NotImplementedError:
        torch._dynamo.reset()
        return False
    return True
