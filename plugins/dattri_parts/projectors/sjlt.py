"""The sparse sketch: every coordinate is added to, or taken from, a few of the numbers left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import LinearMap, RandomStream, Space, SpecError
from dattri_parts.projectors.entries import SPAN, entries, random_integers
from dattri_parts.projectors.flat import SCOPES, Kernel, Scope, flat_map, sketched_space

VERSION = 1
"""Of the rule that makes the matrix; a key holds it, so that another rule is another sketch."""
COLUMNS_AT_ONCE = SPAN * 128
"""Coordinates whose places are drawn at once; bounds the memory, never the numbers."""


@frozen
class SJLT:
    """P = M / sqrt(s): each column of M has s signs, the other entries are 0; E[P^T P] = I.

    The K rows are s parts of K / s, and a coordinate has one sign in each of them, so that its s
    places are never the same. Inner products of rows are unbiased, and that of u and v has the
    variance (|u|^2 |v|^2 + <u, v>^2 - 2 sum_d u_d^2 v_d^2) / K, whatever s is: that of independent
    signs in every entry, at s additions a number instead of K. More of them thin the tails of the
    distribution for rows with a few large numbers. Nothing is kept: places and signs are drawn
    again, a range of coordinates at a time. Source: Kane and Nelson 2014, Sparser
    Johnson-Lindenstrauss Transforms, the block construction (arXiv 1012.1577); Charikar, Chen and
    Farach-Colton 2002, Finding frequent items in data streams, for s = 1.

    Args:
        dim: K, the numbers that are left.
        nonzeros: s, which divides K.
        scope: ``"row"``: of the whole row. ``"block"``: of each block, which keeps its name; one of
            at most K numbers is left as it is.
    """

    dim: int = field(default=2048, validator=validators.ge(1))
    nonzeros: int = field(default=1, validator=validators.ge(1))
    scope: Scope = field(default="row", validator=validators.in_(SCOPES))
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})

    def out_space(self, space: Space) -> Space:
        """Return the space of sketched rows.

        Raises:
            SpecError: s does not divide K.
        """
        if self.dim % self.nonzeros:
            raise SpecError(
                f"projector 'sjlt': dim={self.dim} is no multiple of nonzeros={self.nonzeros}, "
                "which cut it into parts of equal size; give a dim that is one, such as "
                f"{-(-self.dim // self.nonzeros) * self.nonzeros}"
            )
        return sketched_space(space, self.dim, self.scope)

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the map.

        Raises:
            SpecError: s does not divide K.
        """
        self.out_space(space)

        def kernel(*block: str) -> Kernel:
            return SparseKernel(stream.key("sjlt", VERSION, *block), self.dim, self.nonzeros)

        return flat_map("sjlt", space, self.dim, self.scope, kernel)


@frozen(eq=False)
class SparseKernel:
    """A `Kernel` with s signs a column: ``M[j K / s + place_j(d), d] = sign_j(d)`` for j < s.

    Args:
        key: Of the generator.
        rows: K.
        nonzeros: s.
    """

    key: int
    rows: int
    nonzeros: int

    @property
    def scale(self) -> float:
        """Return 1 / sqrt(s)."""
        return 1 / math.sqrt(self.nonzeros)

    def add(self, values: Tensor, start: int, out: Tensor) -> None:
        """Add ``M[:, start:start+m] v`` for every row v to ``out``."""
        for first, last in _ranges(start, start + values.shape[1]):
            part = values[:, first - start : last - start].to(out.dtype)
            for row, signs in self._drawn(first, last, out.device):
                _add_columns(out, row, part * signs.to(out.dtype))

    def adjoint(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]^T k`` for every row k."""
        raised = keys.new_zeros(len(keys), stop - start)
        for first, last in _ranges(start, stop):
            part = raised[:, first - start : last - start]
            for row, signs in self._drawn(first, last, keys.device):
                part += keys[:, row] * signs.to(keys.dtype)
        return raised

    def matrix(self, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]``."""
        written = torch.zeros(self.rows, stop - start, dtype=torch.float64)
        columns = torch.arange(stop - start)
        for row, signs in self._drawn(start, stop, None):
            written[row, columns] = signs.double()
        return written

    def _drawn(
        self, start: int, stop: int, device: torch.device | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rows ``[stop-start]`` and the signs of one entry of each column, s times."""
        height = self.rows // self.nonzeros
        for j in range(self.nonzeros):
            place = torch.as_tensor(random_integers(self.key, j, start, stop, height, device))
            signs = entries(self.key, (j, j + 1), (start, stop), "signs", device)
            yield place + j * height, signs[0]


def _add_columns(out: Tensor, row: Tensor, values: Tensor) -> None:
    """Add column i of the values to column ``row[i]`` of ``out``, in the same order every time."""
    if out.device.type == "cpu":
        out.scatter_add_(1, row.expand_as(values), values)
    else:  # what is accumulated by an index is sorted first, so no two threads add to one number
        out.T.index_put_((row,), values.T, accumulate=True)


def _ranges(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of columns that end at multiples of a span, so that no draw is in two."""
    first = start
    while first < stop:
        last = min(first - first % SPAN + COLUMNS_AT_ONCE, stop)
        yield first, last
        first = last
