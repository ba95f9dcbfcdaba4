"""A random choice of the inputs and of the outputs of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import field, frozen, validators

from dattri_core import LinearMap, RandomStream, Selection, Space
from dattri_parts.projectors.sampling import sorted_sample
from dattri_parts.projectors.sides import (
    UNCOVERED,
    KroneckerMap,
    SelectedSide,
    SideRanks,
    Uncovered,
    failures_of,
)

VERSION = 1
"""Of the rule that draws samples; a key holds it, so that another rule is another sketch."""


@frozen
class FactorMask:
    """P = M_out (x) M_in for each layer: a row G ``[O, I]`` becomes M_out G M_in^T.

    M_in keeps r_in inputs, drawn without replacement, times sqrt(I / r_in), and M_out keeps r_out
    outputs times sqrt(O / r_out): E[P^T P] = I. A row that is a sum of outer products e x^T keeps
    its factors, and only the chosen entries of e and x are read. All entries in a row or a column
    of G are kept or lost together, so that inner products vary more than under a mask of as many
    single entries. Source: Hu et al. 2025, GraSS: Scalable Data Attribution with Gradient
    Sparsification and Sparse Projection, section 3, the mask of FactGraSS (arXiv 2505.18976), here
    with the scale that makes it unbiased.

    Args:
        rank: r on both sides. A side of at most that length is left as it is, so that a large rank
            is no sketch at all.
        rank_in: r on the side of the inputs (the bias counts as one more), instead of ``rank``.
        rank_out: r on the side of the outputs, instead of ``rank``.
        uncovered: What to do with rows that come without factors, those of norms and of modules
            without a layer rule: ``"keep"`` them, ``"drop"`` them from all inner products, or
            ``"sketch"`` their matrix view of O rows, from both sides like a layer's.
    """

    rank: int = field(default=128, validator=validators.ge(1))
    rank_in: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    rank_out: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    uncovered: Uncovered = field(default="keep", validator=validators.in_(UNCOVERED))
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint", "keeps-factors"})

    @property
    def expected_failures(self) -> Mapping[str, str]:
        """Return which laws do not hold, and why."""
        return failures_of(self.uncovered)

    @property
    def ranks(self) -> SideRanks:
        """Return what is left of each side."""
        outputs, inputs = (
            self.rank if own is None else own for own in (self.rank_out, self.rank_in)
        )
        return SideRanks("factor-mask", outputs, inputs, self.uncovered)

    def out_space(self, space: Space) -> Space:
        """Return the space of masked rows; a block that is left as it is keeps its parameters.

        Raises:
            SpecError: No block is left.
        """
        return self.ranks.out_space(space)

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the map."""
        sides = {}
        for spec, side, rank, size in self.ranks.sides(space):
            key = stream.key("factor-mask", VERSION, spec.name, side)
            index = sorted_sample(key, size, rank).to(device)
            chosen = Selection(index, size, math.sqrt(size / rank))
            sides[spec.name, side] = SelectedSide(chosen)
        return KroneckerMap("factor-mask", space, self.out_space(space), sides)
