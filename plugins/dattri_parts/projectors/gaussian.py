"""The dense sketch with normal entries."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import LinearMap, RandomStream, Space
from dattri_parts.projectors.entries import entries
from dattri_parts.projectors.flat import SCOPES, Kernel, Scope, flat_map, sketched_space
from dattri_parts.projectors.tiled import TiledKernel

VERSION = 1
"""Of the rule that makes the matrix; a key holds it, so that another rule is another sketch."""


@frozen
class Gaussian:
    """P = M / sqrt(K), the entries of M independent and normal: E[P^T P] = I.

    Inner products of rows are unbiased, and that of u and v has the variance
    (|u|^2 |v|^2 + <u, v>^2) / K, which is never less than with signs, and an entry costs about
    ten times as much to draw. Source: Dasgupta and Gupta 2003, An elementary proof of a theorem of
    Johnson and Lindenstrauss; Park et al. 2023, TRAK (arXiv 2303.14186), section 3.

    Args:
        dim: K, the numbers that are left.
        scope: ``"row"``: of the whole row. ``"block"``: of each block, which keeps its name; one of
            at most K numbers is left as it is.
        backend: ``"numpy"`` and ``"torch"`` give the same matrix; ``"auto"`` is torch.
    """

    dim: int = field(default=2048, validator=validators.ge(1))
    scope: Scope = field(default="row", validator=validators.in_(SCOPES))
    backend: Literal["auto", "numpy", "torch"] = field(
        default="auto", validator=validators.in_(("auto", "numpy", "torch"))
    )
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})

    def out_space(self, space: Space) -> Space:
        """Return the space of sketched rows."""
        return sketched_space(space, self.dim, self.scope)

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the map."""

        def kernel(*block: str) -> Kernel:
            key = stream.key("gaussian", VERSION, *block)
            columns = partial(_normals, key, self.dim)
            host = self.backend == "numpy"
            return TiledKernel(self.dim, 1 / math.sqrt(self.dim), columns, host)

        return flat_map("gaussian", space, self.dim, self.scope, kernel)


def _normals(key: int, rows: int, start: int, stop: int, device: torch.device | None) -> Tensor:
    return entries(key, (0, rows), (start, stop), "normal", device)
