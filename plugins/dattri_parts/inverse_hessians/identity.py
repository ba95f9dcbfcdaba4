"""No curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from attrs import frozen

from dattri_core import Damping, Inverse, Problem, Rows, Space


@frozen
class Identity:
    """H = I without damping: test rows pass as they are, as in TracIn and Grad-Dot."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, space: Space) -> None:
        """Accept any space."""

    def fit(self, problem: Problem) -> Inverse:
        """Return the inverse that does nothing."""
        return _IdentityInverse()


@frozen
class _IdentityInverse:
    stats: ClassVar[Mapping[str, float]] = {}
    blockwise: ClassVar[bool] = True

    def apply(self, rows: Rows) -> Rows:
        return rows

    def with_damping(self, damping: Damping) -> Inverse:
        return self
