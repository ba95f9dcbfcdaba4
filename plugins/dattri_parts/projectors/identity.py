"""No sketch."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import frozen

from dattri_core import LinearMap, RandomStream, Rows, Space


@frozen
class Identity:
    """P = I: rows pass as they are."""

    gives: ClassVar[frozenset[str]] = frozenset({"adjoint", "keeps-factors"})

    def out_space(self, space: Space) -> Space:
        """Return the same space."""
        return space

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the map that does nothing."""
        return _IdentityMap(space)


@frozen
class _IdentityMap:
    out_space: Space
    blockwise: ClassVar[bool] = True
    is_identity: ClassVar[bool] = True

    def map(self, rows: Rows) -> Rows:
        return rows

    def adjoint(self, rows: Rows) -> Rows:
        return rows
