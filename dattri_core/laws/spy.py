"""A spy on the operations that a piece of code runs on tensors."""

from __future__ import annotations

from typing import Any

from dattri_core.dispatched import DispatchMode


class Operations(DispatchMode):
    """Record the names of the tensor operations that run inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note one operation and run it."""
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
