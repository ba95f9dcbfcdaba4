"""Kronecker factors of the layers' blocks, added up over the train set, and their eigenvectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import define, field, fields, frozen
from torch import Tensor

from dattri_core import (
    Block,
    NumericsError,
    SpecError,
    factor_entries,
    factor_sums,
    give_back,
    processes_now,
)
from dattri_parts.curvatures.live import eigenpairs
from dattri_parts.curvatures.sides import sides_of, tensors_of
from dattri_parts.curvatures.spectrum import Kronecker
from dattri_parts.curvatures.uncovered import require_bytes


@define(eq=False)
class Factors:
    """Sums over the positions of all rows that count.

    ``outputs`` is sum e e^T ``[O, O]``, ``inputs`` is sum x x^T ``[I, I]``, or its diagonal ``[I]``
    for one-hot inputs. Rows of G groups have ``[G, O, O]``, ``[G, I, I]`` and ``[G]`` positions.
    """

    outputs: Tensor
    inputs: Tensor
    positions: int | Tensor


TILE = 512
"""Rows and columns that are symmetrised at once."""
IDLE = 2
"""Times the memory of a fit are there while it lasts: what queries will take is not taken yet."""
DECOMPOSED = "factors, eigenvalues and the decomposition of the largest factor"
SUMS = tuple(entry.name for entry in fields(Factors))


@frozen(eq=False)
class EigenFactors:
    """Eigenvectors of both factors, with the eigenvalues in float64."""

    sides: Kronecker
    outputs: Tensor  # [O] or [G, O]
    inputs: Tensor  # [I] or [G, I]
    positions: int | Tensor

    def product(self, weight: float) -> Tensor:
        """Return the eigenvalues of K-FAC, weight times S (x) A / positions: ``[O, I]``.

        Those of groups are stacked, ``[G O, I]``.
        """
        count = torch.as_tensor(self.positions, device=self.outputs.device).double().clamp_min(1)
        grid = self.outputs.unsqueeze(-1) * self.inputs.unsqueeze(-2)
        return (grid * (weight / count)[..., None, None]).reshape(-1, self.inputs.shape[-1])


@define(eq=False)
class FactorReader:
    """Adds up the factors of some blocks.

    Args:
        names: The blocks; others are passed over.
        average: Take one position for each row ("reduce").
        curvature: For messages.
        memory: Bytes that all factors may take.
    """

    names: frozenset[str]
    average: bool
    curvature: str
    memory: int
    found: dict[str, Factors] = field(factory=dict)
    held: dict[str, int] = field(factory=dict)
    working: int = 0  # bytes of the dearest decomposition so far: one is made at a time

    def add(self, name: str, block: Block) -> None:
        """Add the rows of one block of one batch.

        Raises:
            MemoryBudgetError: The factors do not fit; known after one batch.
        """
        if name not in self.names:
            return
        if name not in self.held:
            outputs, inputs = block.shape
            entries = factor_entries(block) + outputs * inputs
            self.held[name] = entries * max(4, block.dtype.itemsize)
            total = sum(self.held.values())
            require_bytes(self.curvature, self.held, total, self.memory, "may be used")
        sums = factor_sums(block, average=self.average)
        if name not in self.found:
            self.found[name] = Factors(sums.outputs, sums.inputs, sums.positions)
            for side in (sums.outputs, sums.inputs):
                self.working = max(self.working, _decomposition_bytes(side))
            total = sum(self.held.values()) + self.working
            available = IDLE * self.memory
            require_bytes(self.curvature, self.held, total, available, "may be used", DECOMPOSED)
            return
        factors = self.found[name]
        if factors.inputs.shape != sums.inputs.shape:
            raise SpecError(
                f"curvature {self.curvature!r}: block {name!r} has factors of other shapes in some "
                f"batches, {tuple(factors.inputs.shape)} and {tuple(sums.inputs.shape)}: one-hot "
                "inputs or groups in one and not in the other; leave its parameters out"
            )
        factors.outputs.add_(sums.outputs)
        factors.inputs.add_(sums.inputs)
        factors.positions = factors.positions + sums.positions

    def sums(self) -> dict[str, Tensor]:
        """Return the factors as sums by name, those of another part of the train set add to."""
        found = {}
        for name, each in self.found.items():
            for what in SUMS:
                sums = getattr(each, what)
                found[f"{what} of {name}"] = torch.as_tensor(sums, device=each.outputs.device)
        return found


def decompose_all(
    names: Sequence[str], sums: dict[str, Tensor], device: torch.device
) -> dict[str, EigenFactors]:
    """Return the eigenvectors of the factors of some blocks; each is let go of when it is read.

    Of several processes each decomposes some, and gets those of the others.

    Args:
        names: Of the blocks, in order.
        sums: What `FactorReader.sums` names, over the whole train set.
        device: Where they live.

    Raises:
        NumericsError: A factor cannot be decomposed; its block is named.
    """
    give_back()  # what the pass over the train set has freed: the largest factor needs room
    there = [name for name in names if f"{SUMS[0]} of {name}" in sums]
    processes = processes_now()
    if processes is None:
        return {name: decompose(_taken(sums, name), name) for name in there}
    dearest = sorted(there, key=lambda name: -_work(sums, name))
    mine: dict[str, Tensor] = {}
    for name in dearest[processes.rank :: processes.size]:
        eigen = decompose(_taken(sums, name), name)
        mine |= tensors_of({name: eigen.sides})
        for what in SUMS:
            values = torch.as_tensor(getattr(eigen, what), device=device)
            mine[f"{what} of {name}"] = values
    found = processes.collected(mine, device)
    sides = sides_of(there, found)
    return {
        name: EigenFactors(sides[name], *(found[f"{what} of {name}"] for what in SUMS))
        for name in there
    }


def _work(sums: Mapping[str, Tensor], name: str) -> int:
    """Return about how much work a decomposition is: none for the diagonal of one-hot inputs."""
    sides = (sums[f"{what} of {name}"] for what in ("outputs", "inputs"))
    return sum(side.shape[-1] ** 3 for side in sides if side.dim() > 1)


def _decomposition_bytes(side: Tensor) -> int:
    """Return the bytes beside a factor while it is decomposed; none for a diagonal.

    Two matrices in float64, as it is read and as eigenvectors, and LAPACK's workspace of two.
    """
    return 16 * (side.numel() + side.shape[-1] ** 2) if side.dim() > 1 else 0


def _taken(sums: dict[str, Tensor], name: str) -> Factors:
    return Factors(*(sums.pop(f"{what} of {name}") for what in SUMS))


def decompose(factors: Factors, name: str) -> EigenFactors:
    """Return the eigenvectors of both factors of a block, computed in float64."""
    outputs, left = eigenvectors(factors.outputs, f"output factor of block {name!r}")
    if factors.inputs.dim() == 1:
        inputs, right = factors.inputs.double(), None
    else:
        inputs, right = eigenvectors(factors.inputs, f"input factor of block {name!r}")
    return EigenFactors(Kronecker(left, right), outputs, inputs, factors.positions)


def eigenvectors(factor: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[k]`` in float64 and eigenvectors ``[k, k]`` in the factor's dtype.

    A factor is a sum of squares: eigenvalues that rounding made negative are 0.

    Raises:
        NumericsError: The factor is not finite, not symmetric, not positive, or the decomposition
            fails; the message says which one.
    """
    precision = torch.finfo(factor.dtype).eps
    matrix = factor.to(torch.float64, copy=True)
    least, greatest = matrix.aminmax() if matrix.numel() else [matrix.new_zeros(())] * 2
    size = torch.maximum(-least, greatest)
    if not torch.isfinite(size):
        raise NumericsError(
            f"{what}: not finite; look for a diverged checkpoint, or for squares that overflow: "
            "try model.double()"
        )
    skew = _symmetrise(matrix)
    if skew > 1e3 * precision * size:
        raise NumericsError(
            f"{what}: not symmetric, entries differ from their mirror by up to {float(skew):.3g} "
            f"of {float(size):.3g}; matrix products are less exact than {factor.dtype} (TF32?): "
            "torch.set_float32_matmul_precision('highest'), or model.double()"
        )
    try:
        values, vectors = eigenpairs(matrix)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericsError(
            f"{what}: its eigenvectors, {matrix.shape[-1]} x {matrix.shape[-1]}, were not found "
            f"({error}); leave the layer out (Task(parameters=...)), or take the curvature "
            "'diagonal'"
        ) from error
    del matrix  # the eigenvectors are copied below
    smallest = float(values.min()) if values.numel() else 0.0
    if smallest < -1e3 * precision * values.shape[-1] * float(size):
        raise NumericsError(
            f"{what}: its smallest eigenvalue is {smallest:.3g} and its largest entry "
            f"{float(size):.3g}, where a sum of squares has none below 0; try model.double()"
        )
    # As they would come from disk: products with another layout in memory round otherwise.
    return values.clamp_(min=0), vectors.to(factor.dtype).contiguous()


def _symmetrise(matrix: Tensor) -> Tensor:
    """Replace A by (A + A^T) / 2 in place, tile by tile; return the largest |A - A^T|."""
    worst = matrix.new_zeros(())
    tiles = [slice(first, first + TILE) for first in range(0, matrix.shape[-1], TILE)]
    for at, rows in enumerate(tiles):
        for columns in tiles[at:]:
            upper, lower = matrix[..., rows, columns], matrix[..., columns, rows].mT
            worst = torch.maximum(worst, (upper - lower).abs().amax())
            mean = (upper + lower) / 2
            matrix[..., rows, columns] = mean
            matrix[..., columns, rows] = mean.mT
    return worst
