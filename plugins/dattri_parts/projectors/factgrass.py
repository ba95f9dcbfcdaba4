"""FactGraSS: a mask on each side of a layer, the small outer product, then its sparse sketch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from attrs import evolve, field, frozen, validators

from dattri_core import LinearMap, RandomStream, Rows, Space
from dattri_parts.projectors.chain import ChainMap, stream_of
from dattri_parts.projectors.factor_mask import FactorMask
from dattri_parts.projectors.sides import UNCOVERED, Uncovered, failures_of
from dattri_parts.projectors.sjlt import SJLT


@frozen
class FactGrass:
    """P = S (M_out (x) M_in) for each layer: S the sparse sketch of M_out G M_in^T to k numbers.

    The masks keep r_in inputs and r_out outputs of a layer, so that of a row that is a sum of outer
    products only r_out r_in numbers are formed, whatever the layer's size. The chain of
    ``factor-mask`` and ``sjlt``, number by number. Source: Hu et al. 2025, GraSS: Scalable Data
    Attribution with Gradient Sparsification and Sparse Projection, section 3, FactGraSS (arXiv
    2505.18976), here with masks that are random and unbiased; the paper's Selective Mask does not
    exist here.

    Args:
        dim: k, for each layer; one of which the masks leave at most so many numbers is not
            sketched any further.
        mask_rank: r on both sides. A side of at most that length is left as it is.
        mask_rank_in: r on the side of the inputs (the bias counts as one more), instead of
            ``mask_rank``.
        mask_rank_out: r on the side of the outputs, instead of ``mask_rank``.
        nonzeros: Signs of each number in S.
        uncovered: What to do with rows that come without factors, those of norms and of modules
            without a layer rule: ``"keep"`` them whole, ``"drop"`` them from all inner products, or
            ``"sketch"`` their matrix view of O rows like a layer's.
    """

    dim: int = field(default=4096, validator=validators.ge(1))
    mask_rank: int = field(default=128, validator=validators.ge(1))
    mask_rank_in: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    mask_rank_out: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    nonzeros: int = field(default=1, validator=validators.ge(1))
    uncovered: Uncovered = field(default="keep", validator=validators.in_(UNCOVERED))
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})

    @property
    def expected_failures(self) -> Mapping[str, str]:
        """Return which laws do not hold, and why."""
        return failures_of(self.uncovered)

    @property
    def mask(self) -> FactorMask:
        """Return M_out (x) M_in."""
        return FactorMask(
            self.mask_rank,
            rank_in=self.mask_rank_in,
            rank_out=self.mask_rank_out,
            uncovered=self.uncovered,
        )

    @property
    def sketch(self) -> SJLT:
        """Return S."""
        return SJLT(self.dim, self.nonzeros, "block")

    def out_space(self, space: Space) -> Space:
        """Return the space of sketched rows.

        Raises:
            SpecError: No block is left, or ``nonzeros`` does not divide k.
        """
        masked = self.mask.out_space(space)
        covered = self.sketch.out_space(self._covered(space, masked))
        return _replaced(masked, covered)

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the map."""
        mask = self.mask.build(space, stream=stream_of(stream, 0), device=device)
        covered = self._covered(space, mask.out_space)
        sketch = self.sketch.build(covered, stream=stream_of(stream, 1), device=device)
        return ChainMap(space, (mask, CoveredMap(mask.out_space, covered, sketch)))

    def _covered(self, space: Space, masked: Space) -> Space:
        """Return the part of the masked space that is sketched."""
        kept = self.uncovered == "keep"
        return masked.select(s.name for s in masked if not (kept and space[s.name].kind == "dense"))


@frozen(eq=False)
class CoveredMap:
    """A blockwise map of some blocks; the others pass as they are.

    Args:
        in_space: All blocks.
        covered: Those that are mapped.
        inner: Maps them.
    """

    in_space: Space
    covered: Space
    inner: LinearMap
    blockwise: ClassVar[bool] = True

    @property
    def out_space(self) -> Space:
        """Return the space of mapped rows."""
        return _replaced(self.in_space, self.inner.out_space)

    def map(self, rows: Rows) -> Rows:
        """Return the rows, the covered blocks of them mapped."""
        return self._through(rows, self.inner.map, self.out_space)

    def adjoint(self, rows: Rows) -> Rows:
        """Return the rows, the covered blocks of them mapped back."""
        return self._through(rows, self.inner.adjoint, self.in_space)

    def _through(self, rows: Rows, act: Callable[[Rows], Rows], after: Space) -> Rows:
        names = [name for name in rows.space.names if name in self.covered]
        blocks = {**rows.blocks, **act(rows.select(names)).blocks}
        return evolve(rows, space=after.select(rows.space.names), blocks=blocks)


def _replaced(space: Space, others: Space) -> Space:
    """Return a space with some of its blocks replaced by those of the same names."""
    named = {spec.name: spec for spec in others}
    return Space(tuple(named.get(spec.name, spec) for spec in space))
