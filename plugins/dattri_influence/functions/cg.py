"""Inverse-Hessian-vector products by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dattri_parts.solvers.cg import CG

from dattri_core import Damping
from dattri_influence.functions.inverse import InverseProduct, invert
from dattri_influence.functions.point import Argnums, Function


def ihvp_cg(
    function: Function,
    argnums: Argnums = 0,
    *,
    damping: Damping | float = 0.0,
    maximum_iterations: int = 100,
    tolerance: float = 1e-5,
) -> Callable[[Sequence[Any], Any], Any]:
    """Return ``product(arguments, vectors)``: (H + damping I)^-1 v; see `ihvp_at_x_cg`."""

    def product(arguments: Sequence[Any], vectors: Any) -> Any:
        return ihvp_at_x_cg(
            function,
            *arguments,
            argnums=argnums,
            damping=damping,
            maximum_iterations=maximum_iterations,
            tolerance=tolerance,
        )(vectors)

    return product


def ihvp_at_x_cg(
    function: Function,
    *arguments: Any,
    argnums: Argnums = 0,
    damping: Damping | float = 0.0,
    maximum_iterations: int = 100,
    tolerance: float = 1e-5,
) -> InverseProduct:
    """Return ``product(vectors)``: (H + damping I)^-1 v by the solver ``"cg"``.

    All vectors share one product with H an iteration, and each stops for itself. A vector that
    meets negative curvature keeps its last iterate, with a warning.

    Args:
        function: Of tensors or nests of them (dicts of parameters); returns one number.
        arguments: Where; all arguments of the function.
        argnums: The arguments that H is of; an integer, or several.
        damping: lambda, absolute, or a `Damping`.
        maximum_iterations: Products with H at most.
        tolerance: Relative residual at which a vector is solved.
    """
    solver = CG(damping=damping, maximum_iterations=maximum_iterations, tolerance=tolerance)
    return invert(solver, function, arguments, argnums)
