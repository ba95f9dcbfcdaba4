"""Operators that answer more than products: what `Curvature.gives` may promise beside "apply"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from dattri_core.protocols import LinearMap, Operator


@runtime_checkable
class SpectralOperator(Operator, Protocol):
    """H = Q diag(L) Q^T, Q with orthonormal columns: any function of H is one of L."""

    @property
    def basis(self) -> LinearMap:
        """Return Q: ``map`` is Q^T g, ``adjoint`` is Q g; blockwise where H is block diagonal."""
        ...

    @property
    def eigenvalues(self) -> Mapping[str, Tensor]:
        """Return L by block of ``basis.out_space``, each of the shape of one row."""
        ...

    @property
    def complete(self) -> bool:
        """Return what becomes of a direction orthogonal to all columns of Q.

        False: H is zero there, and (H + damping I)^-1 is 1 / damping. True: there is none, or it is
        dropped, held fixed; every function of H is zero there.
        """
        ...
