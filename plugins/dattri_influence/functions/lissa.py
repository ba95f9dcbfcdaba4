"""Inverse-Hessian-vector products by LiSSA, on samples of the examples or on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dattri_parts.solvers.lissa import LiSSA

from dattri_core import Damping
from dattri_influence.functions.inverse import InverseProduct, invert
from dattri_influence.functions.point import Argnums, Function


def ihvp_lissa(
    function: Function,
    argnums: Argnums = 0,
    *,
    in_dims: Sequence[int | None] | None = None,
    batch: int | None = None,
    depth: int = 1000,
    repeats: int = 1,
    damping: Damping | float = 0.0,
    scale: float | None = None,
    seed: int = 0,
) -> Callable[[Sequence[Any], Any], Any]:
    """Return ``product(arguments, vectors)``: (H + damping I)^-1 v; see `ihvp_at_x_lissa`."""

    def product(arguments: Sequence[Any], vectors: Any) -> Any:
        return ihvp_at_x_lissa(
            function,
            *arguments,
            argnums=argnums,
            in_dims=in_dims,
            batch=batch,
            depth=depth,
            repeats=repeats,
            damping=damping,
            scale=scale,
            seed=seed,
        )(vectors)

    return product


def ihvp_at_x_lissa(
    function: Function,
    *arguments: Any,
    argnums: Argnums = 0,
    in_dims: Sequence[int | None] | None = None,
    batch: int | None = None,
    depth: int = 1000,
    repeats: int = 1,
    damping: Damping | float = 0.0,
    scale: float | None = None,
    seed: int = 0,
) -> InverseProduct:
    """Return ``product(vectors)``: (H + damping I)^-1 v by the solver ``"lissa"``.

    With ``batch`` every step takes the Hessian of the function of so many examples instead, drawn
    anew; the function has to be a *mean* over them. All vectors share the draws.

    Args:
        function: Of tensors or nests of them (dicts of parameters); returns one number.
        arguments: Where; all arguments of the function.
        argnums: The arguments that H is of; an integer, or several.
        in_dims: With ``batch``: the axis of examples of each argument, or None, as of
            `torch.func.vmap`.
        batch: Examples of a step; None for all of them.
        depth: Steps of the series.
        repeats: Runs whose mean is taken.
        damping: lambda, absolute, or a `Damping`; the limit has this damping whatever the scale.
        scale: Above half the largest eigenvalue of every sample; None to estimate it.
        seed: Of the draws.

    Raises:
        NumericsError: The series diverges: the scale is too small, or H + damping I is not positive
            definite.
    """
    solver = LiSSA(damping=damping, depth=depth, repeats=repeats, batch=batch, scale=scale)
    return invert(solver, function, arguments, argnums, in_dims=in_dims, seed=seed)
