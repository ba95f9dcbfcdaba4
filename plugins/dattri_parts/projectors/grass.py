"""GraSS: a random mask, then the sparse sketch of what it leaves."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field, frozen, validators

from dattri_core import LinearMap, RandomStream, Space, SpecError
from dattri_parts.projectors.chain import Chain
from dattri_parts.projectors.flat import SCOPES, Scope
from dattri_parts.projectors.mask import Mask
from dattri_parts.projectors.sjlt import SJLT


@frozen
class Grass:
    """P = S M: M a mask of k' coordinates, S the sparse sketch of these to k numbers.

    The chain of ``mask`` and ``sjlt``, number by number. A row costs k' additions, however long it
    is; what the mask loses shows in the variance. Source: Hu et al. 2025, GraSS: Scalable Data
    Attribution with Gradient Sparsification and Sparse Projection, section 3 (arXiv 2505.18976),
    here with a mask that is random and unbiased; the paper's Selective Mask does not exist here.

    Args:
        dim: k.
        mask_dim: k', at least k.
        nonzeros: Signs of each coordinate in S.
        scope: ``"row"``: of the whole row. ``"block"``: of each block, which keeps its name; what
            has at most k' numbers is not masked, what has at most k is left as it is.
    """

    dim: int = field(default=2048, validator=validators.ge(1))
    mask_dim: int = field(default=8192, validator=validators.ge(1))
    nonzeros: int = field(default=1, validator=validators.ge(1))
    scope: Scope = field(default="row", validator=validators.in_(SCOPES))
    gives: ClassVar[frozenset[str]] = frozenset({"adjoint"})

    @property
    def chain(self) -> Chain:
        """Return the two sketches that it is made of."""
        return Chain((Mask(self.mask_dim, self.scope), SJLT(self.dim, self.nonzeros, self.scope)))

    def out_space(self, space: Space) -> Space:
        """Return the space of sketched rows.

        Raises:
            SpecError: The mask leaves fewer numbers than the sketch, or ``nonzeros`` does not
                divide k.
        """
        if self.mask_dim < self.dim:
            raise SpecError(
                f"projector 'grass': mask_dim={self.mask_dim} leaves fewer numbers than "
                f"dim={self.dim}, which are sketched from them; give a mask_dim of at least the "
                "dim, such as four times as many"
            )
        return self.chain.out_space(space)

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the map."""
        self.out_space(space)
        return self.chain.build(space, stream=stream, device=device)
