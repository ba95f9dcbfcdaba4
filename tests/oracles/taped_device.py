"""A CUDA device that records, on the CPU: operations are taped, and run again where they wrote."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from dattri_parts.training import recorded, sequential
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Stands for a CUDA graph: it holds what was asked of the device, and on which tensors."""

    made: list[Tape] = []

    def __init__(self) -> None:
        super().__init__()
        self.taped: list[tuple[Any, Any, Any, list[Any]]] = []
        self.replays = 0
        Tape.made.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        found = func(*args, **(kwargs or {}))
        self.taped.append((func, args, kwargs or {}, tree_leaves(found)))
        return found

    def replay(self) -> None:
        """Run it all again, from and into the same memory."""
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, places in self.taped:
                for place, value in zip(places, tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                        place.detach().copy_(value)


class _Stream:
    def wait_stream(self, other: Any) -> None:
        """Do nothing: one operation ends before the next begins."""


@contextmanager
def _taping(tape: Tape, stream: Any) -> Any:
    # A device that records computes nothing yet, so random numbers are drawn from the replay on.
    with tape, torch.random.fork_rng(devices=[]):
        yield


def pretend(monkeypatch: Any) -> list[Tape]:
    """Let the CPU record; return the tapes that are made."""
    Tape.made = []

    class Cuda:
        Stream = staticmethod(lambda device: _Stream())
        current_stream = staticmethod(lambda device: _Stream())
        stream = staticmethod(lambda stream: nullcontext())
        graph = staticmethod(_taping)
        CUDAGraph = Tape

    class Torch:
        cuda = Cuda

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(recorded, "torch", Torch())
    monkeypatch.setattr(sequential, "RECORDING", ("cpu", "cuda"))
    return Tape.made
