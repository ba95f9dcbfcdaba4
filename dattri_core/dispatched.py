"""Passes under a dispatch mode, which sees what torch computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
