"""Inverse-Hessian-vector products by the Hessian written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dattri_parts.solvers.cholesky import Cholesky

from dattri_core import Damping
from dattri_influence.functions.inverse import InverseProduct, invert
from dattri_influence.functions.point import Argnums, Function


def ihvp_explicit(
    function: Function, argnums: Argnums = 0, *, damping: Damping | float = 0.0
) -> Callable[[Sequence[Any], Any], Any]:
    """Return ``product(arguments, vectors)``: (H + damping I)^-1 v; see `ihvp_at_x_explicit`."""

    def product(arguments: Sequence[Any], vectors: Any) -> Any:
        return ihvp_at_x_explicit(function, *arguments, argnums=argnums, damping=damping)(vectors)

    return product


def ihvp_at_x_explicit(
    function: Function,
    *arguments: Any,
    argnums: Argnums = 0,
    damping: Damping | float = 0.0,
) -> InverseProduct:
    """Return ``product(vectors)``: (H + damping I)^-1 v from a factor of H in float64.

    H of d numbers is written down and factorised once, by the solver ``"cholesky"``, in 16 d^2
    bytes. An indefinite H is inverted exactly, with a warning.

    Args:
        function: Of tensors or nests of them (dicts of parameters); returns one number.
        arguments: Where; all arguments of the function.
        argnums: The arguments that H is of; an integer, or several.
        damping: lambda, absolute, or a `Damping`.

    Raises:
        NumericsError: H + damping I is singular to the precision of the numbers.
        MemoryBudgetError: H does not fit half of the memory that is free.
    """
    return invert(Cholesky(damping=damping), function, arguments, argnums)
