"""For tests of plugins: the conformance laws as pytest cases, toy worlds, oracles, peak memory."""

from __future__ import annotations

import os
import unittest
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dattri_core.batch import tensors_of
from dattri_core.dispatched import DispatchMode
from dattri_core.laws import Law, LawBroken, bench_of, find, laws_of, part_of
from dattri_core.laws.oracles import ggn, gradients, hessian, place, plain_rows, plain_space
from dattri_core.laws.problems import DenseProblem, problem_of
from dattri_core.laws.spaces import ToyOperator, toy_rows
from dattri_core.laws.worlds import (
    World,
    language,
    logistic,
    minimise_logistic,
    network,
    regression,
    worlds,
)
from dattri_core.registry import Registry, using

__all__ = [
    "DenseProblem",
    "LawCase",
    "PeakMemory",
    "ToyOperator",
    "World",
    "ggn",
    "gradients",
    "hessian",
    "language",
    "law_cases",
    "logistic",
    "minimise_logistic",
    "network",
    "no_plugins",
    "place",
    "plain_rows",
    "plain_space",
    "problem_of",
    "regression",
    "toy_rows",
    "worlds",
]


@frozen(eq=False)
class LawCase:
    """One law on one part; called, it passes, raises `LawBroken`, or skips with the reason."""

    law: Law
    bench: Callable[[], Any]

    @property
    def __name__(self) -> str:
        """Return the name of the law, which pytest shows."""
        return self.law.name

    def __call__(self) -> None:
        """Check the law."""
        finding = find(self.law, self.bench())
        if finding.status == "failed":
            raise LawBroken(f"{finding.law}: {finding.statement}\n{finding.detail}")
        if finding.status != "passed":
            raise unittest.SkipTest(f"{finding.status}: {finding.detail}")


def law_cases(kind: str, name_or_part: Any) -> list[LawCase]:
    """Return the laws of a kind on a part, to parametrise a test with.

    In a plugin's tests::

        @pytest.mark.parametrize("law", law_cases("scorer", "my-scorer"))
        def test_my_scorer(law): law()

    Args:
        kind: One of `dattri_core.laws.KINDS`, or ``"attributor"``.
        name_or_part: A registered name, looked up when the test runs, or the part itself.
    """

    @cache
    def bench() -> Any:
        return bench_of(kind, part_of(kind, name_or_part))

    return [LawCase(law, bench) for law in laws_of(kind)]


class PeakMemory(DispatchMode):
    """Count the bytes of tensors made inside the block that are alive, and their maximum.

    Deterministic and the same on every machine: storages are counted as torch makes and frees them,
    each once however many views it has; those that existed before are not counted, nor is memory
    that a kernel or another library takes for itself.

    ``peak`` and ``live`` are bytes; `reset` starts a new maximum at what is alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def reset(self) -> None:
        """Start a new maximum at what is alive now."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count the storages of its results."""
        for tensor in tensors_of((args, kwargs)):
            self._see(tensor, new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            self._see(tensor, new=True)
        return result

    def _see(self, tensor: Tensor, *, new: bool) -> None:
        if tensor.is_sparse or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        held = self._known.get(key)
        if held is not None and held[0]() is storage:
            counted = held[1]
            if counted >= 0 and storage.nbytes() != counted:  # resized in place
                self._known[key] = (held[0], storage.nbytes())
                self._add(storage.nbytes() - counted)
            return
        size = storage.nbytes() if new else -1  # -1: it was there before, and is not counted
        self._known[key] = (weakref.ref(storage, partial(self._forget, key)), size)
        self._add(max(size, 0))

    def _forget(self, key: int, _: object) -> None:
        _, size = self._known.pop(key)
        self.live -= max(size, 0)

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def no_plugins(keep: str = "") -> Iterator[Registry]:
    """Block the discovery of plugins, as if only ``keep`` (names, comma) were installed."""
    before = os.environ.get("DATTRI_PLUGINS")
    os.environ["DATTRI_PLUGINS"] = keep
    try:
        with using(Registry.discovered()) as registry:
            yield registry
    finally:
        if before is None:
            del os.environ["DATTRI_PLUGINS"]
        else:
            os.environ["DATTRI_PLUGINS"] = before
