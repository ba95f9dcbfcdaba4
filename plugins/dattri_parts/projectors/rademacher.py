"""The dense sketch with signs."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import LinearMap, RandomStream, Space
from dattri_parts.projectors.backends import BACKENDS, Backend, chosen_backend
from dattri_parts.projectors.entries import entries
from dattri_parts.projectors.flat import SCOPES, Kernel, Scope, flat_map, sketched_space
from dattri_parts.projectors.tiled import TiledKernel

VERSION = 1
"""Of the rule that makes the matrix; a key holds it, so that another rule is another sketch."""


@frozen
class Rademacher:
    """P = M / sqrt(K), the entries of M independent signs: E[P^T P] = I.

    Inner products of rows are unbiased, and that of u and v has the variance
    (|u|^2 |v|^2 + <u, v>^2 - 2 sum_d u_d^2 v_d^2) / K. Every number costs K signs and as many
    multiplications, so that on a CPU it suits rows of up to a million numbers. Source: Achlioptas
    2003, Database-friendly random projections, theorem 1.1; Park et al. 2023, TRAK (arXiv
    2303.14186), section 3.

    Args:
        dim: K, the numbers that are left.
        scope: ``"row"``: of the whole row. ``"block"``: of each block, which keeps its name; one of
            at most K numbers is left as it is.
        backend: ``"numpy"``, ``"torch"`` and ``"triton"`` give the same matrix; ``"auto"`` is
            Triton on CUDA devices where it runs, and torch elsewhere.
    """

    dim: int = field(default=2048, validator=validators.ge(1))
    scope: Scope = field(default="row", validator=validators.in_(SCOPES))
    backend: Backend = field(default="auto", validator=validators.in_(BACKENDS))
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})

    def out_space(self, space: Space) -> Space:
        """Return the space of sketched rows."""
        return sketched_space(space, self.dim, self.scope)

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the map.

        Raises:
            SpecError: The backend does not run on the device.
        """
        backend = chosen_backend(self.backend, device, "rademacher")

        def kernel(*block: str) -> Kernel:
            key = stream.key("rademacher", VERSION, *block)
            columns = partial(_signs, key, self.dim)
            return TiledKernel(self.dim, 1 / math.sqrt(self.dim), columns, backend == "numpy")

        return flat_map("rademacher", space, self.dim, self.scope, kernel)


def _signs(key: int, rows: int, start: int, stop: int, device: torch.device | None) -> Tensor:
    return entries(key, (0, rows), (start, stop), "signs", device)
