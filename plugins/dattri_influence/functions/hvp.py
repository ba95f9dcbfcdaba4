"""Hessian-vector products of any function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dattri_influence.functions.point import Argnums, Function, Point, held, products

WHAT = "Hessian-vector product"


def hvp(function: Function, argnums: Argnums = 0) -> Callable[[Sequence[Any], Any], Any]:
    """Return ``product(arguments, vectors)``: H v, H the Hessian of a function at its arguments.

    Two reverse passes, so that every operation with a second derivative takes part. It can be used
    inside of `torch.func.vmap` and `torch.func.grad`, over points and over vectors.

    Args:
        function: Of tensors or nests of them (dicts of parameters); returns one number.
        argnums: The arguments that H is of; an integer, or several, whose mixed derivatives H has.

    Returns:
        A function of the tuple of arguments and of vectors: a nest like that argument (for several
        argnums a tuple of nests), of the same shapes, or ``[C, *shape]`` for C vectors at once.
        The products have the structure and shapes of the vectors.

    Raises:
        InputError: The function does not return one number, or the vectors have other shapes.
    """

    def product(arguments: Sequence[Any], vectors: Any) -> Any:
        point = Point.of(function, arguments, argnums)
        values, many = point.layout.read(vectors, WHAT)
        return point.layout.fill(products(point.transpose(), values, many=many))

    return product


def hvp_at_x(function: Function, *arguments: Any, argnums: Argnums = 0) -> Callable[[Any], Any]:
    """Return ``product(vectors)``: H v at one point.

    The function and its gradient are evaluated once; each call is one more backward pass. The point
    is a constant: tensors are detached. The product can be used inside of `torch.func.vmap`.

    Args:
        function: As in `hvp`.
        arguments: Where; all arguments of the function.
        argnums: As in `hvp`.
    """
    point = Point.of(function, held(arguments), argnums)
    transpose = point.transpose()

    def product(vectors: Any) -> Any:
        values, many = point.layout.read(vectors, WHAT)
        return point.layout.fill(products(transpose, values, many=many))

    return product
