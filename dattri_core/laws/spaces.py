"""Toy spaces, rows and operators for parts that never see a model."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import frozen
from torch import Tensor

from dattri_core.blocks import Block, DenseBlock, OneHot, OuterBlock
from dattri_core.laws.worlds import integers, random
from dattri_core.protocols import RandomStream
from dattri_core.rows import Rows
from dattri_core.space import BlockSpec, ParameterView, Space

SPACE = Space(
    (
        BlockSpec(
            "linear",
            "outer",
            (3, 5),
            (
                ParameterView("linear.weight", (3, 4), 0, 4),
                ParameterView("linear.bias", (3,), 4, 5),
            ),
        ),
        BlockSpec(
            "embedding", "outer", (2, 6), (ParameterView("embedding.weight", (6, 2), 0, 6, True),)
        ),
        BlockSpec("scale", "dense", (4,), (ParameterView("scale", (4,), 0, 1),)),
    )
)


def toy_rows(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Rows:
    """Return rows of `SPACE`: factors, an embedding's indices, and a dense block."""
    blocks: dict[str, Block] = {
        "linear": OuterBlock(random(count, 2, 3, seed=seed), random(count, 2, 5, seed=seed + 1)),
        "embedding": OuterBlock(
            random(count, 3, 2, seed=seed + 2), OneHot(integers(6, count, 3, seed=seed + 3), 6)
        ),
        "scale": DenseBlock(random(count, 4, seed=seed + 4)),
    }
    aux = {"label": integers(3, count, seed=seed + 5)}
    return Rows(SPACE, blocks, torch.arange(count) + 100, aux).to(dtype=dtype)


def formed(rows: Rows) -> Rows:
    """Return the same rows without factors."""
    return rows.map_blocks(lambda _, block: block.dense())


def flat_rows(space: Space, count: int, seed: int = 0) -> Rows:
    """Return formed random rows of any space."""
    return Rows.from_flat(space, random(count, space.dim, seed=seed), torch.arange(count) + 100)


def symmetric(size: int, low: float, high: float, seed: int = 77) -> Tensor:
    """Return a dense symmetric float64 matrix with eigenvalues from ``low`` to ``high``."""
    basis, _ = torch.linalg.qr(random(size, size, seed=seed))
    values = torch.linspace(low, high, size, dtype=torch.float64)
    matrix: Tensor = (basis * values) @ basis.T
    return matrix


@frozen(eq=False)
class ToyOperator:
    """An operator that is a matrix: it answers all of `GIVEN`.

    As a mean over examples it is that of the matrices H + E, H - E, H + F, H - F.
    """

    space: Space
    matrix: Tensor
    dtype: torch.dtype = torch.float64
    memory: int = 2**28
    n_train: ClassVar[int] = 4
    random: ClassVar[RandomStream] = RandomStream(0, "law")

    def apply(self, rows: Rows) -> Rows:
        """Return H g for every row g."""
        flat = rows.flat()
        return Rows.from_flat(self.space, flat @ self.matrix.to(flat.dtype), rows.index, rows.aux)

    def apply_on(self, rows: Rows, index: Tensor) -> Rows:
        """Return H g for every row g, H the mean over some examples."""
        size, flat = self.space.dim, rows.flat()
        turns = [symmetric(size, -0.04, 0.04, seed=seed) for seed in (78, 79)]
        signs = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])[index].mean(0)
        matrix = self.matrix + sum(float(s) * t for s, t in zip(signs, turns, strict=True))
        return Rows.from_flat(self.space, flat @ matrix.to(flat.dtype), rows.index, rows.aux)

    def dense(self) -> Tensor:
        """Return the matrix."""
        return self.matrix


GIVEN = frozenset({"apply", "dense", "sampled"})
"""What `ToyOperator` answers."""
