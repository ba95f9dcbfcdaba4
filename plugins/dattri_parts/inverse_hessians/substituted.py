"""The inverse of a curvature that took another's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen
from torch import Tensor

from dattri_core import (
    Damping,
    Inverse,
    LeverageInverse,
    LinearMap,
    Rows,
    SharingInverse,
    SpectralInverse,
    SplitInverse,
)


@frozen(eq=False)
class Substituted:
    """An inverse as it is, with all that it can do, which reports that it is a substitute.

    Args:
        inverse: That of the substitute.
        place: 1: of the first substitute; 2: of the fallback.
    """

    inverse: Inverse
    place: int

    @property
    def stats(self) -> Mapping[str, float]:
        """Return those of the inverse, and which substitute it is of."""
        return {**self.inverse.stats, "substituted": float(self.place)}

    @property
    def blockwise(self) -> bool:
        """Return whether the substitute is block diagonal."""
        return self.inverse.blockwise

    def apply(self, rows: Rows) -> Rows:
        """Return (H + damping I)^-1 g for every row g, H the substitute."""
        return self.inverse.apply(rows)

    def with_damping(self, damping: Damping) -> Inverse:
        """Return the inverse at another damping."""
        return Substituted(self.inverse.with_damping(damping), self.place)

    # --- what a plan asks of it -----------------------------------------------------------------
    @property
    def forms(self) -> bool:
        """Return whether every block of an answer is formed."""
        return bool(getattr(self.inverse, "forms", True))

    @property
    def base(self) -> int:
        """Return of how many rows of H an answer is a combination."""
        return int(getattr(self.inverse, "base", 0))

    @property
    def beside(self) -> int:
        """Return how many formed rows are alive beside an answer while it is made."""
        return int(getattr(self.inverse, "beside", 3))

    @property
    def held(self) -> int:
        """Return the bytes that the inverse keeps."""
        return int(getattr(self.inverse, "held", 0))

    # --- what only some inverses can do ---------------------------------------------------------
    @property
    def leverages(self) -> bool:
        """Return whether the inverse knows what train rows are to themselves."""
        return isinstance(self.inverse, LeverageInverse) and self.inverse.leverages

    def self_influence(self) -> Tensor:
        """Return <g, (H + damping I)^-1 g> of every train row g, ``[n_train]``."""
        assert isinstance(self.inverse, LeverageInverse)
        return self.inverse.self_influence()

    def apply_each(self, rows: Rows, inverses: Sequence[Inverse]) -> list[Rows]:
        """Return the rows after the inverse at several dampings, together where that is less."""
        inner = [one.inverse for one in inverses if isinstance(one, Substituted)]
        if isinstance(self.inverse, SharingInverse):
            return self.inverse.apply_each(rows, inner)
        return [one.apply(rows) for one in inner]

    @property
    def basis(self) -> LinearMap | None:
        """Return the eigenvectors of the substitute; None where the inverse cannot be split."""
        return self.inverse.basis if isinstance(self.inverse, SplitInverse) else None

    @property
    def spectrum(self) -> Mapping[str, tuple[Tensor, float]] | None:
        """Return its eigenvalues and dampings, where the inverse knows them."""
        return self.inverse.spectrum if isinstance(self.inverse, SpectralInverse) else None

    def in_basis(self, rows: Rows) -> Rows:
        """Return (L + damping)^-1 k for rows k in the basis."""
        assert isinstance(self.inverse, SplitInverse)
        return self.inverse.in_basis(rows)
