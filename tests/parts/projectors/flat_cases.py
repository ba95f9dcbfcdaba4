"""The flat projectors, one line each, with what is known of their matrices: every test runs on all.

A case says what the tests compare with: the variance of an inner product over seeds in closed form,
whether |P e_i| is exactly 1, and the matrix as it was frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import attrs
import torch
from dattri_parts.projectors.block_count_sketch import BlockCountSketch
from dattri_parts.projectors.gaussian import Gaussian
from dattri_parts.projectors.rademacher import Rademacher
from dattri_parts.projectors.srht import SRHT
from torch import Tensor

from dattri_core import BlockSpec, DenseBlock, RandomStream, Rows, Space

CPU = torch.device("cpu")
Variance = Callable[[Tensor, Tensor], float]


def of_signs(dim: int) -> Variance:
    """Return (|u|^2 |v|^2 + <u, v>^2 - 2 sum u_d^2 v_d^2) / K."""

    def variance(u: Tensor, v: Tensor) -> float:
        return float(((u @ u) * (v @ v) + (u @ v) ** 2 - 2 * (u * u) @ (v * v)) / dim)

    return variance


def of_normals(dim: int) -> Variance:
    """Return (|u|^2 |v|^2 + <u, v>^2) / K."""
    return lambda u, v: float(((u @ u) * (v @ v) + (u @ v) ** 2) / dim)


def between_blocks(dim: int, length: int) -> Variance:
    """Return that of signs without the pairs of two coordinates of one block, which never meet."""
    whole = of_signs(dim)

    def variance(u: Tensor, v: Tensor) -> float:
        pairs = zip(u.split(length), v.split(length), strict=True)
        return whole(u, v) - sum(whole(a, b) for a, b in pairs)

    return variance


@dataclass(frozen=True)
class Case:
    """One projector.

    Args:
        part: With K = 64.
        variance: Of <P u, P v> over seeds.
        unit: Whether |P e_i| = 1 exactly.
        digest: First 16 digits of the SHA-256 of M[:, :4096] in float64, at seed 0.
        corner: Row and value of its first six entries that are not 0, column by column.
        many: The same projector with a large K, for tails and for long tables of columns.
        backends: That work on the CPU.
    """

    part: Any
    variance: Variance
    unit: bool
    digest: str
    corner: list[list[float]]
    many: Any
    backends: tuple[str, ...] = ("torch", "numpy")


K = 64
CASES = {
    "rademacher": Case(
        Rademacher(K),
        of_signs(K),
        True,
        "bdf573cab808d815",
        [[0, -1.0], [1, 1.0], [2, 1.0], [3, 1.0], [4, 1.0], [5, -1.0]],
        Rademacher(2048),
    ),
    "gaussian": Case(
        Gaussian(K),
        of_normals(K),
        False,
        "5726edd471f6cc9f",
        [
            [0, -0.2882789075374603],
            [1, 1.8078798055648804],
            [2, -0.7543426156044006],
            [3, 0.7256456613540649],
            [4, 0.5264230370521545],
            [5, 1.255344033241272],
        ],
        Gaussian(2048),
    ),
    "block-count-sketch": Case(
        BlockCountSketch(K),
        between_blocks(K, K),
        True,
        "4f9f358b6940dd0a",
        [[20, 1.0], [21, -1.0], [22, 1.0], [23, -1.0], [24, -1.0], [25, -1.0]],
        BlockCountSketch(2048),
    ),
    "block-count-sketch-4": Case(
        BlockCountSketch(K, nonzeros=4),
        between_blocks(K, K // 4),
        True,
        "6682f5b5d902c003",
        [[5, 1.0], [23, 1.0], [37, -1.0], [48, 1.0], [6, -1.0], [24, 1.0]],
        BlockCountSketch(2048, nonzeros=4),
    ),
    "srht": Case(
        SRHT(K),
        between_blocks(K, K),
        True,
        "e2c44fa6c6312089",
        [[0, 1.0], [1, -1.0], [2, 1.0], [3, 1.0], [4, -1.0], [5, 1.0]],
        SRHT(2048),
    ),
}
PAIRS = [(name, backend) for name, case in CASES.items() for backend in case.backends]


def one_block(size: int) -> Space:
    """Return a space of one dense block."""
    return Space((BlockSpec("flat", "dense", (size,)),))


def build(part: Any, space: Space, seed: int = 0, checkpoint: int = 0, device: Any = CPU) -> Any:
    """Return the map of a projector."""
    stream = RandomStream(seed, "projector", checkpoint)
    return part.build(space, stream=stream, device=torch.device(device))


def kernel_of(part: Any, backend: str = "auto", seed: int = 0, checkpoint: int = 0) -> Any:
    """Return the random matrix of whole rows of any length."""
    return build(attrs.evolve(part, backend=backend), one_block(1), seed, checkpoint).kernel


def rows_of(flat: Tensor) -> Rows:
    """Return flat rows as rows of one dense block."""
    return Rows(one_block(flat.shape[1]), {"flat": DenseBlock(flat)}, torch.arange(len(flat)))


def sketched(kernel: Any, values: Tensor, start: int = 0) -> Tensor:
    """Return M v for every row v, ``[B, K]``."""
    wide = torch.promote_types(values.dtype, torch.float32)
    rows = kernel.matrix(start, start + 1).shape[0]
    out = torch.zeros(len(values), rows, dtype=wide, device=values.device)
    kernel.add(values, start, out)
    return out


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Return integers from -4 to 4 in float32: their sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).float()


def normals(*shape: int, seed: int = 0) -> Tensor:
    """Return normal float64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
