"""A law: a plain function of a bench, chosen by facts that a part declares, never by its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from attrs import frozen
from torch import Tensor

from dattri_core.errors import DattriError

Condition = Callable[[Any], "str | None"]
Check = Callable[[Any], None]
C = TypeVar("C", bound=Check)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
"""Largest difference that a law allows, relative to the largest number compared."""


class LawBroken(DattriError, AssertionError):  # noqa: N818 - it names the fact, not an error
    """A part breaks a law; the message holds the numbers."""


class NotApplicable(DattriError):  # noqa: N818
    """A law says nothing about a part; the message holds the reason."""


@frozen
class Law:
    """One law of a kind of part."""

    kind: str
    name: str
    statement: str
    run: Check
    conditions: tuple[Condition, ...]

    def check(self, bench: Any) -> None:
        """Raise `NotApplicable` where declared facts leave the part out, `LawBroken` if broken."""
        for condition in self.conditions:
            reason = condition(bench)
            if reason is not None:
                raise NotApplicable(reason)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # toy tensors: more threads only wait for each other
        try:
            self.run(bench)
        finally:
            torch.set_num_threads(threads)


LAWS: dict[str, dict[str, Law]] = {}


def law(kind: str, *conditions: Condition) -> Callable[[C], C]:
    """Register a function of a bench as a law of a kind; the docstring's first line states it.

    Args:
        kind: Of part.
        conditions: Each returns None, or the reason why the law says nothing about the part.
    """

    def add(function: C) -> C:
        statement = (function.__doc__ or "").strip().splitlines()[0]
        name = function.__name__.replace("_", "-")
        LAWS.setdefault(kind, {})[name] = Law(kind, name, statement, function, conditions)
        return function

    return add


def require(truth: bool, message: str) -> None:
    """Raise `LawBroken` unless true."""
    if not truth:
        raise LawBroken(message)


def require_equal(got: object, want: object, what: str) -> None:
    """Raise `LawBroken` unless the two are equal."""
    require(got == want, f"{what}: got {got!r}, expected {want!r}")


def require_identical(got: Tensor, want: Tensor, what: str) -> None:
    """Raise `LawBroken` unless two tensors agree bit for bit."""
    require_equal(tuple(got.shape), tuple(want.shape), f"{what}: shape")
    require(
        torch.equal(got, want), f"{what}: differs by {_gap(got, want):.3e}, expected no difference"
    )


def require_same_aux(got: Mapping[str, Tensor], want: Mapping[str, Tensor], what: str) -> None:
    """Raise `LawBroken` unless two sets of auxiliary numbers agree in names and bits."""
    require_equal(set(got), set(want), f"{what}: names")
    for name, numbers in want.items():
        require_identical(got[name], numbers, f"{what}: {name!r}")


def require_close(got: Tensor, want: Tensor, what: str, tolerance: float | None = None) -> None:
    """Raise `LawBroken` unless two tensors agree to the tolerance of the coarser dtype."""
    require_equal(tuple(got.shape), tuple(want.shape), f"{what}: shape")
    require(bool(torch.isfinite(got).all()), f"{what}: not finite")
    if tolerance is None:
        tolerance = max(TOLERANCE.get(t.dtype, 2e-4) for t in (got, want))
    scale = float(want.detach().abs().max()) if want.numel() else 0.0
    gap = _gap(got, want)
    require(
        gap <= tolerance * max(scale, 1e-12),
        f"{what}: differs by {gap:.3e}, largest number expected {scale:.3e}, "
        f"allowed {tolerance * scale:.1e}",
    )


def _gap(got: Tensor, want: Tensor) -> float:
    if not got.numel():
        return 0.0
    return float((got.detach().double() - want.detach().double()).abs().max())
