"""A random choice of coordinates."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from attrs import field, frozen, validators
from torch import Tensor

from dattri_core import Block, LinearMap, RandomStream, Space, pick_entries
from dattri_parts.projectors.flat import SCOPES, Kernel, Scope, flat_map, sketched_space
from dattri_parts.projectors.sampling import sorted_sample

VERSION = 1
"""Of the rule that draws samples; a key holds it, so that another rule is another sketch."""


@frozen
class Mask:
    """P g = sqrt(D / k) (g_a for a in a random set of k coordinates of D): E[P^T P] = I.

    The set is drawn without replacement. Inner products are unbiased, and that of u and v has the
    variance (D - k) / (k (D - 1)) (D sum_d u_d^2 v_d^2 - <u, v>^2): small only where the products
    u_d v_d are spread out. Of a row that is a sum of outer products only the chosen entries are
    computed, where that is cheaper than to form it. What is kept are the k numbers of the set.
    Source: Hu et al. 2025, GraSS: Scalable Data Attribution with Gradient Sparsification and Sparse
    Projection, section 3, the random mask (arXiv 2505.18976), here with the scale that makes it
    unbiased. The paper's Selective Mask, which is learned from gradients, does not exist here.

    Args:
        dim: k. Of fewer coordinates all are kept.
        scope: ``"row"``: of the whole row. ``"block"``: of each block, which keeps its name; one of
            at most k numbers is left as it is.
    """

    dim: int = field(default=8192, validator=validators.ge(1))
    scope: Scope = field(default="row", validator=validators.in_(SCOPES))
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})

    def out_space(self, space: Space) -> Space:
        """Return the space of masked rows."""
        return sketched_space(space, self._left_of(space), self.scope)

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the map."""
        left = self._left_of(space)

        def kernel(*block: str) -> Kernel:
            size = space[block[0]].size if block else space.dim
            index = sorted_sample(stream.key("mask", VERSION, *block), size, left)
            return MaskKernel(index, index.to(device), size)

        return flat_map("mask", space, left, self.scope, kernel)

    def _left_of(self, space: Space) -> int:
        return min(self.dim, space.dim) if self.scope == "row" else self.dim


@frozen(eq=False)
class MaskKernel:
    """A `Kernel` with one 1 in each row: ``M[j, index[j]] = 1``.

    Args:
        host: The chosen coordinates, ascending, ``[k]``, on the CPU, so that to find those of a
            block never waits for a device.
        index: The same on the device of the rows.
        size: D.
    """

    host: Tensor
    index: Tensor
    size: int

    @property
    def scale(self) -> float:
        """Return sqrt(D / k)."""
        return math.sqrt(self.size / len(self.host))

    def add(self, values: Tensor, start: int, out: Tensor) -> None:
        """Add ``M[:, start:start+m] v`` for every row v to ``out``."""
        here = self._within(start, start + values.shape[1])
        out[:, here] += values.index_select(1, self.index[here] - start).to(out.dtype)

    def add_block(self, block: Block, start: int, out: Tensor) -> None:
        """Add what is chosen of a block to ``out``; the other entries are not computed."""
        here = self._within(start, start + math.prod(block.shape))
        if here.start < here.stop:
            out[:, here] += pick_entries(block, self.index[here] - start).to(out.dtype)

    def adjoint(self, keys: Tensor, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]^T k`` for every row k."""
        here = self._within(start, stop)
        raised = keys.new_zeros(len(keys), stop - start)
        return raised.index_copy_(1, self.index[here] - start, keys[:, here])

    def matrix(self, start: int, stop: int) -> Tensor:
        """Return ``M[:, start:stop]``."""
        return (self.host[:, None] == torch.arange(start, stop)).double()

    def _within(self, start: int, stop: int) -> slice:
        """Return which of the chosen coordinates lie in a range."""
        first, last = torch.searchsorted(self.host, torch.tensor([start, stop])).tolist()
        return slice(first, last)
