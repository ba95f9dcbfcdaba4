"""Batched matrix products that share an operand: as one larger product, and without its zeros."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dattri_core.batch import Batch, tensors_of

NARROW = 32
"""Outputs up to which one wide product beats a batch of narrow ones, in spite of its strides."""
SHORTEST_GAP = 4
"""Empty columns in a row that are worth a cut; a shorter gap costs more than its zeros."""
EMPTY_SHARE = 8
"""Empty columns are left out where they are at least one in so many."""


def shared_operands(vectors: Mapping[str, Tensor], batch: Batch) -> AbstractContextManager[Any]:
    """Return `SharedOperands` where most entries of the vectors, or parts of the batch, ask for it.

    They do where most entries belong to narrow layers, or where an input is zero for the whole
    batch, as the margin of an image is. Elsewhere it would only cost: every operation passes
    through it.
    """
    if any(value.device.type != "cpu" for value in vectors.values()):
        return nullcontext()
    sizes = {name: value[0].numel() for name, value in vectors.items() if len(value)}
    narrow = sum(
        size
        for name, size in sizes.items()
        if vectors[name].dim() == 3 and vectors[name].shape[1] <= NARROW
    )
    inputs = (t for t in tensors_of(batch) if t.is_floating_point() and t.dim() > 1 and len(t))
    if 2 * narrow > sum(sizes.values()) or any(_live(t.flatten(1)) for t in inputs):
        return SharedOperands()
    return nullcontext()


class SharedOperands(TorchDispatchMode):
    """While entered, ``bmm`` on the CPU spares work where the whole batch shares an operand.

    With many tangents V_c at one activation X, vmap asks for ``X V_c`` as a batch over c with X
    repeated. For layers with few outputs the libraries run that as C narrow products;
    ``X [V_1 ... V_C]`` is one wide product, two to three times as fast. And where columns of X are
    zero for all examples, pixels at the margin or units that never fire, their products are zero
    and are not computed. The numbers are equal up to rounding.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[Any, tuple[Tensor, Live | None]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, or its replacement."""
        if func is torch.ops.aten.bmm.default and args[0].device.type == "cpu":
            left, right = args
            if _is_shared(left):
                return self._shared_left(left[0], right)
            if _is_shared(right):
                return self._shared_right(left, right[0])
        return func(*args, **(kwargs or {}))

    def _shared_left(self, shared: Tensor, right: Tensor) -> Tensor:
        live = self._live(shared)
        # Zero times what is not finite is not zero.
        if live is not None and bool(torch.isfinite(right.sum())):
            shared, right = live.values, live.rows(right)
        if right.shape[2] <= NARROW:
            return _wide_left(shared, right)
        return torch.bmm(shared.expand(len(right), -1, -1), right)

    def _shared_right(self, left: Tensor, shared: Tensor) -> Tensor:
        live = self._live(shared)
        if live is not None and bool(torch.isfinite(left.sum())):
            return live.spread(_times(left, live.values), shared.shape[1])
        return _times(left, shared)

    def _live(self, shared: Tensor) -> Live | None:
        """Return where an operand is not zero; looked at once, since all vectors share it."""
        key = shared.data_ptr(), shared.shape, shared.stride(), shared.dtype, shared._version
        if key not in self._known:
            # Held, so that no other tensor takes its place in memory while it is known.
            self._known[key] = shared, _live(shared)
        return self._known[key][1]


@frozen(eq=False)
class Live:
    """The columns of a matrix that are not zero, in runs.

    Args:
        runs: The runs, in order; gaps shorter than `SHORTEST_GAP` belong to them.
        values: The columns of all runs, ``[N, live]``.
    """

    runs: tuple[slice, ...]
    values: Tensor

    def rows(self, right: Tensor) -> Tensor:
        """Return the rows of each ``right [C, D, O]`` that meet columns of the runs."""
        if right.stride(1) == 1:  # the transpose of a row-major matrix, as a weight's tangent
            return torch.cat([right.mT[:, :, run] for run in self.runs], dim=2).mT
        return torch.cat([right[:, run] for run in self.runs], dim=1)

    def spread(self, narrow: Tensor, width: int) -> Tensor:
        """Return ``narrow [C, O, live]`` with its columns in their places, ``[C, O, width]``."""
        whole = narrow.new_zeros(*narrow.shape[:2], width)
        at = 0
        for run in self.runs:
            size = run.stop - run.start
            whole[:, :, run] = narrow[:, :, at : at + size]
            at += size
        return whole


def _live(matrix: Tensor) -> Live | None:
    """Return the columns that are not zero, or None where too few are zero."""
    marks = matrix.any(0).tolist()  # true for what is not a number
    if EMPTY_SHARE * (len(marks) - sum(marks)) < len(marks):
        return None
    runs: list[slice] = []
    for at in (at for at, mark in enumerate(marks) if mark):
        if runs and at - runs[-1].stop < SHORTEST_GAP:
            runs[-1] = slice(runs[-1].start, at + 1)
        else:
            runs.append(slice(at, at + 1))
    kept = sum(run.stop - run.start for run in runs)
    if not runs or EMPTY_SHARE * (len(marks) - kept) < len(marks):
        return None
    return Live(tuple(runs), torch.cat([matrix[:, run] for run in runs], dim=1))


def _is_shared(batch: Tensor) -> bool:
    return batch.shape[0] > 1 and batch.stride(0) == 0


def _times(left: Tensor, right: Tensor) -> Tensor:
    """Return each of ``left [C, O, N]`` times ``right [N, D]``, ``[C, O, D]``."""
    count, outputs, inner = left.shape
    if outputs > NARROW:
        return torch.bmm(left, right.expand(count, -1, -1))
    tall = left.reshape(count * outputs, inner)
    return torch.mm(tall, right).reshape(count, outputs, right.shape[1])


def _wide_left(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left [N, D]`` times each of ``right [C, D, O]``, ``[C, N, O]`` with O before N."""
    count, width, outputs = right.shape
    # Free of copies when each right is the transpose of a row-major matrix, as a weight's tangent.
    tall = right.mT.reshape(count * outputs, width)
    return torch.mm(tall, left.mT).reshape(count, outputs, len(left)).mT
