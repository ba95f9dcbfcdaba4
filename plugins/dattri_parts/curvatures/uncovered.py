"""Blocks that a Kronecker-factored curvature does not cover: norms, biases on their own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import (
    MemoryBudgetError,
    Problem,
    Space,
    SpecError,
    format_bytes,
    free_bytes,
)

Uncovered = Literal["diagonal", "identity", "drop", "error"]
UNCOVERED: tuple[Uncovered, ...] = ("diagonal", "identity", "drop", "error")
FACTORED = ("outer", "grouped")
NARROWEST = 4  # bytes of one number of a factor, at least
_MEANING = {
    "diagonal": "take the diagonal of the same Fisher matrix",
    "identity": "have the curvature 1",
    "drop": "are held fixed and give nothing to the scores",
}

_log = logging.getLogger("dattri")


@frozen
class Cover:
    """Which blocks of a space have factors, and which do not."""

    factored: tuple[str, ...]
    rest: tuple[str, ...]

    @staticmethod
    def of(space: Space, curvature: str) -> Cover:
        """Split a space.

        Raises:
            SpecError: No block has factors.
        """
        factored = tuple(spec.name for spec in space if spec.kind in FACTORED)
        rest = tuple(spec.name for spec in space if spec.kind not in FACTORED)
        if not factored:
            raise SpecError(
                f"curvature {curvature!r}: needs blocks that keep the factors of a layer (kinds "
                f"'outer' and 'grouped'), and none of {list(rest)[:6]} does; after a flat sketch "
                "no factors are left: put the inverse Hessian first "
                "(stages=[{'inverse_hessian': ...}, {'projector': ...}]), take a projector that "
                "gives 'keeps-factors', or the curvature 'diagonal'; without a sketch, take the "
                "source 'per-example', and leave store= out, which holds rows without factors"
            )
        return Cover(factored, rest)

    def report(self, curvature: str, uncovered: Uncovered) -> None:
        """Say what becomes of the blocks without factors.

        Raises:
            SpecError: There are some, and ``uncovered="error"``.
        """
        if not self.rest:
            return
        names = ", ".join(self.rest[:8]) + (", ..." if len(self.rest) > 8 else "")
        if uncovered == "error":
            raise SpecError(
                f"curvature {curvature!r}: {len(self.rest)} blocks have no factors ({names}) and "
                "uncovered='error'; leave their parameters out (Task(parameters=...)), or give "
                "uncovered='diagonal', 'identity' or 'drop'"
            )
        _log.info(
            "curvature %r: %d blocks have no factors and %s: %s",
            curvature,
            len(self.rest),
            _MEANING[uncovered],
            names,
        )


def without_unit(uncovered: Uncovered) -> Mapping[str, str]:
    """Return which laws a curvature with such blocks does not keep, and why: ones have no unit."""
    if uncovered != "identity":
        return {}
    laws = ("units-are-kept", "examples-without-gradient-count")
    return dict.fromkeys(laws, "H is 1 in blocks that have no factors, whatever the rows are")


def uncovered_eigenvalues(
    problem: Problem, cover: Cover, uncovered: Uncovered, squares: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the eigenvalues of the blocks without factors, in their own coordinates.

    Args:
        problem: The train set.
        cover: Of its space.
        uncovered: What becomes of them.
        squares: The diagonal of the Fisher matrix, where it is asked for.
    """
    dtype = torch.promote_types(problem.dtype, torch.float32)
    found = {}
    for name in cover.rest:
        shape = (0,) if uncovered == "drop" else problem.space[name].shape
        ones = torch.ones(shape, dtype=dtype, device=problem.device)
        found[name] = squares[name] if uncovered == "diagonal" else ones
    return found


def require_room(space: Space, curvature: str) -> None:
    """Raise `MemoryBudgetError` when factors and eigenvalues surely do not fit what is free."""
    needed = {spec.name: 0 for spec in space if spec.kind == "outer"}
    for spec in space:
        if spec.kind == "outer":
            outputs, inputs = spec.shape
            # An embedding, the one layer stored (I, O) without a bias, has a diagonal input side.
            diagonal = all(view.transposed for view in spec.parameters) and spec.parameters
            side = inputs if diagonal else inputs * inputs
            needed[spec.name] = NARROWEST * (outputs * outputs + side + outputs * inputs)
    total = sum(needed.values())
    # Factors live on the task's device, which a check without a task does not know.
    require_bytes(curvature, needed, total, free_bytes_anywhere(), "are free")


def free_bytes_anywhere() -> int:
    """Return the most bytes that are free on one device of this machine."""
    found = [free_bytes(torch.device("cpu"))]
    if torch.cuda.is_available():
        found += [free_bytes(torch.device("cuda", at)) for at in range(torch.cuda.device_count())]
    return max(found)


def require_bytes(
    curvature: str,
    needed: dict[str, int],
    total: int,
    available: int,
    what: str,
    parts: str = "factors and eigenvalues",
) -> None:
    """Raise `MemoryBudgetError` when factors do not fit; names the largest blocks."""
    if total <= available:
        return
    largest = sorted(needed, key=lambda name: -needed[name])[:3]
    each = ", ".join(f"{name!r} {format_bytes(needed[name])}" for name in largest)
    raise MemoryBudgetError(
        f"curvature {curvature!r}: {parts} need {format_bytes(total)} ({each}), "
        f"{format_bytes(available)} {what}; leave the largest layers out "
        f"(Task(parameters=[..., '!{largest[0]}*'])), sketch first with a projector that keeps "
        "factors, or take the curvature 'diagonal'"
    )
