"""Inputs of factored rows: vectors, indices, or either shared by several rows; and their products.

Axes: B and C rows, T and S positions, I a layer's inputs, U inputs that are kept.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from attrs import evolve, frozen
from torch import Tensor

from dattri_core.blocks.block import LinearFunction
from dattri_core.errors import SpecError

HALF = (torch.float16, torch.bfloat16)
ALIGNMENT = 16
"""Bytes at whose multiples tensor cores read fast."""
WIDENS = hasattr(torch.ops.aten.mm, "dtype")
"""Whether torch multiplies half precision into float32, as it does from 2.8 on, on CUDA."""


@frozen(eq=False)
class OneHot:
    """Inputs of an embedding: indices ``[B, T]`` that stand for one-hot vectors of length I."""

    index: Tensor
    size: int

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the one-hot vectors ``[B, T, I]``."""
        return torch.nn.functional.one_hot(self.index, self.size).to(dtype)


@frozen(eq=False)
class Shared:
    """Inputs that several rows have in common: row b has ``values[index[b]]``."""

    values: Tensor | OneHot  # [U, T, I]
    index: Tensor  # [B], on the CPU, so that a choice of rows never waits for a device


Inputs: TypeAlias = Tensor | OneHot | Shared


@frozen(eq=False)
class Selection:
    """The linear function that keeps some entries of the last axis: a matrix that is not written.

    Args:
        index: Of the entries, ascending, ``[k]``.
        size: I, the length of the axis.
        scale: They are multiplied by it.
    """

    index: Tensor
    size: int
    scale: float = 1.0

    def __call__(self, vectors: Tensor) -> Tensor:
        """Return the kept entries of vectors ``[..., I]``, ``[..., k]``."""
        # As a matrix, since a choice of the last of several axes takes several times as long.
        kept = vectors.flatten(0, -2).index_select(1, self.index)
        return accumulate(kept).reshape(*vectors.shape[:-1], len(self.index)) * self.scale

    def transposed(self, vectors: Tensor) -> Tensor:
        """Return vectors ``[..., k]`` put back where they came from, ``[..., I]``."""
        wide = accumulate(vectors)
        raised = wide.new_zeros(*wide.shape[:-1], self.size)
        return raised.index_copy_(-1, self.index, wide * self.scale)

    def columns(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what becomes of one-hot vectors, given by their indices: ``[*index, k]``."""
        place = torch.searchsorted(self.index, index).clamp_(max=len(self.index) - 1)
        kept = (self.index[place] == index).to(dtype) * self.scale
        found = kept.new_zeros(*index.shape, len(self.index))
        return found.scatter_(-1, place.unsqueeze(-1), kept.unsqueeze(-1))


def accumulate(values: Tensor) -> Tensor:
    """Return values in float32 when they are half precision: sums never run in fewer bits."""
    return values.float() if values.dtype in HALF else values


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` with sums in float32 or better, of matrices or of stacks of them.

    Tensor cores multiply half precision exactly and add in float32; no copy in float32 is made.
    """
    return wide_product(left, right)[..., : left.shape[-2], : right.shape[-1]]


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Return `product` as it is computed: with rows and columns of zeros at its end, or none."""
    if not (has_tensor_cores(left) and left.numel() and right.numel()):
        return accumulate(left) @ accumulate(right)
    half = WIDENS and left.dtype == right.dtype and left.dtype in HALF
    if not half:
        left, right = accumulate(left), accumulate(right)
        if left.dtype != torch.float32 or right.dtype != torch.float32 or not _rounds():
            return left @ right
    left, right = aligned(left, right)
    if not half:
        return left @ right
    multiply: Any = torch.mm if left.dim() == 2 else torch.bmm
    found: Tensor = multiply(left, right, out_dtype=torch.float32)
    return found


def has_tensor_cores(values: Tensor) -> bool:
    """Return whether a tensor is on a device that may multiply it by tensor cores."""
    return values.is_cuda


def aligned(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of a product, widened by zeros until their lines are whole 16 bytes.

    Tensor cores take others, such as the 769 inputs of a layer of 768 and a bias, at a fraction of
    their rate. The product has more rows and columns at its end; its others are the same.
    """
    step = ALIGNMENT // left.element_size()
    left_by_rows, right_by_rows = left.stride(-1) == 1, right.stride(-1) == 1
    inner = -left.shape[-1] % step
    if inner and (left_by_rows or not right_by_rows):
        left, right = pad_last(left, inner), pad_last(right.mT, inner).mT
    if not left_by_rows:
        left = pad_last(left.mT, -left.shape[-2] % step).mT
    if right_by_rows:
        right = pad_last(right, -right.shape[-1] % step)
    return left, right


def pad_last(values: Tensor, count: int) -> Tensor:
    """Return values with so many zeros after their last axis."""
    return torch.nn.functional.pad(values, (0, count)) if count else values


def _rounds() -> bool:
    """Return whether products of float32 may be rounded, and so run on tensor cores."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by the newer names, beside which this one cannot be read
        return True


def applied(function: LinearFunction | None, vectors: Tensor) -> Tensor:
    """Return the function of the last axis of vectors, or the vectors where it is None."""
    if function is None:
        return vectors
    if isinstance(function, Tensor):
        wide = accumulate(vectors)
        matrix = _for_all_rows(function).mT.to(wide.dtype)
        if not has_tensor_cores(wide):
            return wide @ matrix
        return product(wide.flatten(0, -2), matrix).reshape(*vectors.shape[:-1], matrix.shape[1])
    return function(vectors)


def applied_to_outputs(function: LinearFunction | None, values: Tensor) -> Tensor:
    """Return the function of the axis before the last one, ``[..., O', I]``.

    By a matrix the numbers come out as they lie in a row, and no turned copy is made.
    """
    if isinstance(function, Tensor) and not has_tensor_cores(values):
        wide = accumulate(values)
        return _for_all_rows(function).to(wide.dtype) @ wide
    return applied(function, values.mT).mT


def _for_all_rows(matrix: Tensor) -> Tensor:
    """Return a matrix; a stack of them, one a row, would meet the rows of a base, or inputs."""
    if matrix.dim() != 2:
        raise SpecError(
            f"map of a block: a tensor {tuple(matrix.shape)} is no matrix [k, I], the same for "
            "every row; form the rows (block.dense().values) to multiply each by its own"
        )
    return matrix


# --- what they are ------------------------------------------------------------------------------
def held_by(inputs: Inputs) -> Tensor:
    """Return the tensor that holds the numbers."""
    kept = inputs.values if isinstance(inputs, Shared) else inputs
    return kept.index if isinstance(kept, OneHot) else kept


def counts_of(inputs: Inputs) -> tuple[int, int]:
    """Return the number of rows and of positions (B, T)."""
    held = held_by(inputs)
    rows = len(inputs.index) if isinstance(inputs, Shared) else held.shape[0]
    return (int(rows), int(held.shape[1]))


def width_of(inputs: Inputs) -> int:
    """Return the length I of one vector."""
    kept = inputs.values if isinstance(inputs, Shared) else inputs
    return kept.size if isinstance(kept, OneHot) else int(kept.shape[2])


def is_one_hot(inputs: Inputs) -> bool:
    """Return whether the inputs are indices."""
    return isinstance(inputs.values if isinstance(inputs, Shared) else inputs, OneHot)


# --- other inputs from them ---------------------------------------------------------------------
def own(inputs: Inputs) -> Tensor | OneHot:
    """Return the inputs of each row apart, ``[B, T, I]``."""
    if not isinstance(inputs, Shared):
        return inputs
    return take_own(inputs.values, inputs.index)


def map_inputs(inputs: Inputs, function: LinearFunction | None, dtype: torch.dtype) -> Inputs:
    """Return a linear function of the inputs; shared ones stay shared.

    A matrix or a selection for indices is read by columns: no one-hot vector is made.
    """
    if isinstance(inputs, Shared):
        mapped = map_inputs(inputs.values, function, dtype)
        assert not isinstance(mapped, Shared)
        return evolve(inputs, values=mapped)
    if function is None:
        return inputs
    if isinstance(inputs, OneHot) and isinstance(function, Tensor):
        return _for_all_rows(function).mT[inputs.index]
    if isinstance(inputs, OneHot) and isinstance(function, Selection):
        return function.columns(inputs.index, torch.promote_types(dtype, torch.float32))
    return applied(function, _written(inputs, dtype))


def take_own(inputs: Tensor | OneHot, index: Tensor | slice) -> Tensor | OneHot:
    """Return the inputs of chosen rows, which share nothing."""
    held = held_by(inputs)
    picked = held[index if isinstance(index, slice) else index.to(held.device)]
    return evolve(inputs, index=picked) if isinstance(inputs, OneHot) else picked


def take_inputs(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """Return the inputs of chosen rows; of shared ones, only those that are still in use."""
    if not isinstance(inputs, Shared):
        return take_own(inputs, index)
    chosen = inputs.index[index if isinstance(index, slice) else index.cpu()]
    used, place = torch.unique(chosen, return_inverse=True)
    count = len(held_by(inputs.values))
    if len(used) == count:
        return evolve(inputs, index=chosen)
    if len(used) and int(used[-1]) - int(used[0]) == len(used) - 1:  # a view, not a copy
        return Shared(take_own(inputs.values, slice(int(used[0]), int(used[-1]) + 1)), place)
    return Shared(take_own(inputs.values, used), place)


def move_inputs(
    inputs: Inputs, device: torch.device | str | None, dtype: torch.dtype | None
) -> Inputs:
    """Return the inputs on another device or in another dtype."""
    if isinstance(inputs, Shared):
        moved = move_inputs(inputs.values, device, dtype)
        assert not isinstance(moved, Shared)
        return inputs if moved is inputs.values else evolve(inputs, values=moved)
    if isinstance(inputs, OneHot):
        index = inputs.index.to(device)
        return inputs if index is inputs.index else evolve(inputs, index=index)
    return inputs.to(device=device, dtype=dtype)


def join_inputs(parts: list[Inputs], positions: int, dtype: torch.dtype) -> Inputs:
    """Join the inputs of several groups of rows, padded to a number of positions."""
    if any(isinstance(part, Shared) for part in parts):
        kept = [part.values if isinstance(part, Shared) else part for part in parts]
        index, first = [], 0
        for part, values in zip(parts, kept, strict=True):
            rows = len(held_by(values))
            index.append(first + (part.index if isinstance(part, Shared) else torch.arange(rows)))
            first += rows
        joined = join_inputs([*kept], positions, dtype)
        assert not isinstance(joined, Shared)
        return Shared(joined, torch.cat(index))
    hot = [part for part in parts if isinstance(part, OneHot)]
    if len(hot) == len(parts):
        return OneHot(torch.cat([pad(one.index, positions) for one in hot]), hot[0].size)
    return torch.cat([pad(_written(own(part), dtype), positions) for part in parts])


def pad(values: Tensor, positions: int) -> Tensor:
    """Return values ``[B, T, ...]`` with zeros after them, up to a number of positions."""
    missing = positions - values.shape[1]
    if missing == 0:
        return values
    return torch.cat([values, values.new_zeros(len(values), missing, *values.shape[2:])], dim=1)


def _written(inputs: Tensor | OneHot, dtype: torch.dtype) -> Tensor:
    return inputs.dense(dtype) if isinstance(inputs, OneHot) else inputs


# --- products -----------------------------------------------------------------------------------
def gram(left: Tensor, right: Tensor) -> Tensor:
    """Return all inner products of vectors, ``[B, T, C, S]``."""
    (b, t, _), (c, s, _) = left.shape, right.shape
    return product(left.flatten(0, 1), right.flatten(0, 1).T).reshape(b, t, c, s)


def input_gram(left: Inputs, right: Inputs, dtype: torch.dtype) -> Tensor:
    """Return all inner products of inputs, ``[B, T, C, S]``; of shared ones, each once."""
    if isinstance(right, Shared):
        each = input_gram(left, right.values, dtype)
        return each.index_select(2, right.index.to(each.device))
    if isinstance(left, Shared):
        each = input_gram(left.values, right, dtype)
        return each.index_select(0, left.index.to(each.device))
    if isinstance(left, OneHot) and isinstance(right, OneHot):
        return (left.index[:, :, None, None] == right.index[None, None]).to(dtype)
    if isinstance(left, OneHot):
        assert isinstance(right, Tensor)
        return accumulate(right)[:, :, left.index].permute(2, 3, 0, 1)  # [C,S,B,T] -> [B,T,C,S]
    if isinstance(right, OneHot):
        return accumulate(left)[:, :, right.index]  # [B, T, C, S]
    return gram(left, right)


def pair_input_gram(left: Inputs, right: Inputs, dtype: torch.dtype) -> Tensor:
    """Return the inner products of each row's inputs with those of the same row, ``[B, T, S]``."""
    left, right = own(left), own(right)
    if isinstance(left, OneHot) and isinstance(right, OneHot):
        return (left.index[:, :, None] == right.index[:, None, :]).to(dtype)
    if isinstance(left, OneHot):
        assert isinstance(right, Tensor)
        picked = accumulate(right).gather(
            2, left.index[:, None, :].expand(-1, right.shape[1], -1)
        )  # [B, S, T]
        return picked.mT
    if isinstance(right, OneHot):
        return accumulate(left).gather(2, right.index[:, None, :].expand(-1, left.shape[1], -1))
    return product(left, right.mT)
