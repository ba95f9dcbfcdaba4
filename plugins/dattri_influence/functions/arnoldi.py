"""Inverse-Hessian-vector products in the eigenvectors of largest eigenvalue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from dattri_parts.solvers.arnoldi import Arnoldi

from dattri_core import Damping
from dattri_influence.functions.inverse import InverseProduct, invert
from dattri_influence.functions.point import Argnums, Function


def ihvp_arnoldi(
    function: Function,
    argnums: Argnums = 0,
    *,
    damping: Damping | float = 0.0,
    rank: int = 100,
    iterations: int = 200,
    complement: Literal["drop", "keep"] = "drop",
) -> Callable[[Sequence[Any], Any], Any]:
    """Return ``product(arguments, vectors)``: V (L + damping I)^-1 V^T v.

    See `ihvp_at_x_arnoldi`.
    """

    def product(arguments: Sequence[Any], vectors: Any) -> Any:
        return ihvp_at_x_arnoldi(
            function,
            *arguments,
            argnums=argnums,
            damping=damping,
            rank=rank,
            iterations=iterations,
            complement=complement,
        )(vectors)

    return product


def ihvp_at_x_arnoldi(
    function: Function,
    *arguments: Any,
    argnums: Argnums = 0,
    damping: Damping | float = 0.0,
    rank: int = 100,
    iterations: int = 200,
    complement: Literal["drop", "keep"] = "drop",
) -> InverseProduct:
    """Return ``product(vectors)``: V (L + damping I)^-1 V^T v by the solver ``"arnoldi"``.

    The Krylov space is built once, by one vector in each product; no call and no other damping
    (``product.with_damping``) takes a further one.

    Args:
        function: Of tensors or nests of them (dicts of parameters); returns one number.
        arguments: Where; all arguments of the function.
        argnums: The arguments that H is of; an integer, or several.
        damping: lambda, absolute, or a `Damping`.
        rank: Eigenvalues of largest magnitude that are kept.
        iterations: Dimension of the Krylov space.
        complement: What is outside of the span of V: dropped, or kept and divided by the damping.

    Raises:
        NumericsError: A kept eigenvalue plus the damping is zero to working precision.
    """
    solver = Arnoldi(damping=damping, rank=rank, iterations=iterations, complement=complement)
    return invert(solver, function, arguments, argnums)
