"""The subsampled randomised Hadamard transform, a block of coordinates at a time."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar, Literal

import torch
from attrs import field, frozen, validators

from dattri_core import LinearMap, RandomStream, Space, SpecError
from dattri_parts.projectors.flat import SCOPES, Kernel, Scope, flat_map, sketched_space
from dattri_parts.projectors.hadamard import HadamardKernel, hadamard_columns
from dattri_parts.projectors.tiled import TiledKernel

VERSION = 1
"""Of the rule that makes the matrix; a key holds it, so that another rule is another sketch."""


@frozen
class SRHT:
    """P = (1/sqrt(K)) (R_0 H S_0, R_1 H S_1, ...), block by block of K coordinates.

    H is the Hadamard matrix of Walsh functions and S_j and R_j are diagonal matrices of random
    signs, so that a number costs log2(K) additions, a block is turned and not shortened, and what
    two blocks add to an inner product is a sum of K random signs, as of a dense sketch: its tails
    are thin however few coordinates hold most of a row. E[P^T P] = I, and the variance of the inner
    product of u and v is at most (|u|^2 |v|^2 + <u, v>^2 - 2 sum_d u_d^2 v_d^2) / K; rows of up to
    K numbers keep their inner products exactly. Source: Ailon and Chazelle 2009, The fast
    Johnson-Lindenstrauss transform and approximate nearest neighbors, section 2; Tropp 2011,
    Improved analysis of the subsampled randomized Hadamard transform (arXiv 1011.1595); adding
    blocks with random signs R_j in place of sampling rows of one long transform, which would need
    the whole row at once, is this package's own.

    Args:
        dim: K, the numbers that are left, a power of two.
        scope: ``"row"``: of the whole row. ``"block"``: of each block, which keeps its name; one of
            at most K numbers is left as it is.
        backend: ``"numpy"``, which writes the matrix down and is slow, and ``"torch"`` give the
            same matrix; ``"auto"`` is torch.
    """

    dim: int = field(default=2048, validator=validators.ge(1))
    scope: Scope = field(default="row", validator=validators.in_(SCOPES))
    backend: Literal["auto", "numpy", "torch"] = field(
        default="auto", validator=validators.in_(("auto", "numpy", "torch"))
    )
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})

    def out_space(self, space: Space) -> Space:
        """Return the space of sketched rows.

        Raises:
            SpecError: The numbers that are left are no power of two.
        """
        if self.dim & (self.dim - 1):
            below = 1 << (self.dim.bit_length() - 1)
            raise SpecError(
                f"projector 'srht': dim={self.dim} is no power of two, which a Hadamard transform "
                f"needs; give dim={below} or dim={2 * below}, or use 'block-count-sketch'"
            )
        return sketched_space(space, self.dim, self.scope)

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the map.

        Raises:
            SpecError: See `out_space`.
        """
        self.out_space(space)

        def kernel(*block: str) -> Kernel:
            key = stream.key("srht", VERSION, *block)
            if self.backend == "numpy":
                columns = partial(hadamard_columns, key, self.dim)
                return TiledKernel(self.dim, 1 / math.sqrt(self.dim), columns, host=True)
            return HadamardKernel(key, self.dim)

        return flat_map("srht", space, self.dim, self.scope, kernel)
