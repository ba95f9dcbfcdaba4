"""The fast sketch of flat rows: every coordinate is added, with a sign, to one number or a few."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
from attrs import field, frozen, validators

from dattri_core import LinearMap, RandomStream, Space, SpecError
from dattri_parts.projectors.backends import BACKENDS, Backend, chosen_backend
from dattri_parts.projectors.flat import SCOPES, Kernel, Scope, flat_map, sketched_space
from dattri_parts.projectors.shifted import ShiftedKernel, shifted_columns
from dattri_parts.projectors.tiled import TiledKernel

VERSION = 1
"""Of the rule that makes the matrix; a key holds it, so that another rule is another sketch."""


@frozen
class BlockCountSketch:
    """Blocks of coordinates are turned by random shifts, given random signs, and added up.

    Coordinate d = j K + i goes to (i + shift_j) mod K with the sign s_d, so that a block of K
    coordinates is one turned copy, nothing is looked up in a table, and a row costs little more
    than reading it. Two coordinates of one block never meet, two of different blocks with
    probability 1/K, as if each were hashed on its own: inner products are unbiased, and that of u
    and v has a variance of at most (|u|^2 |v|^2 + <u, v>^2 - 2 sum_d u_d^2 v_d^2) / K. Rows of up
    to K numbers are kept whole. Source: Charikar, Chen and Farach-Colton 2002, Finding frequent
    items in data streams, section 3; the shifts are this package's own.

    One nonzero a column is the fastest, and as good as a dense sketch where rows spread over many
    coordinates. Where a few coordinates hold most of a row, two of them may meet, which happens
    with probability 1/K and then spoils that inner product; s nonzeros leave 1/s of the damage at
    s^2 times the probability, with the same variance: s sketches of K/s numbers, over sqrt(s).

    Args:
        dim: K, the numbers that are left.
        nonzeros: s, of each column of the matrix; it divides K.
        scope: ``"row"``: of the whole row. ``"block"``: of each block, which keeps its name; one of
            at most K numbers is left as it is.
        backend: ``"numpy"``, which writes the matrix down and is slow, ``"torch"`` and ``"triton"``
            give the same matrix; ``"auto"`` is Triton on CUDA devices where it runs, else torch.
    """

    dim: int = field(default=2048, validator=validators.ge(1))
    nonzeros: int = field(default=1, validator=validators.ge(1))
    scope: Scope = field(default="row", validator=validators.in_(SCOPES))
    backend: Backend = field(default="auto", validator=validators.in_(BACKENDS))
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})

    def out_space(self, space: Space) -> Space:
        """Return the space of sketched rows.

        Raises:
            SpecError: The nonzeros do not divide the numbers that are left.
        """
        if self.dim % self.nonzeros:
            raise SpecError(
                f"projector 'block-count-sketch': nonzeros={self.nonzeros} does not divide "
                f"dim={self.dim}; give nonzeros of which it is a multiple, such as 1, 2 or 4"
            )
        return sketched_space(space, self.dim, self.scope)

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the map.

        Raises:
            SpecError: See `out_space`; or the backend does not run on the device.
        """
        self.out_space(space)
        backend = chosen_backend(self.backend, device, "block-count-sketch")

        def kernel(*block: str) -> Kernel:
            key = stream.key("block-count-sketch", VERSION, *block)
            if backend == "numpy":
                columns = partial(shifted_columns, key, self.dim, self.nonzeros)
                return TiledKernel(self.dim, 1 / math.sqrt(self.nonzeros), columns, host=True)
            return ShiftedKernel(key, self.dim, self.nonzeros)

        return flat_map("block-count-sketch", space, self.dim, self.scope, kernel)
