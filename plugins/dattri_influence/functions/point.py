"""A function of tensors at a point, and products with its Hessian there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from attrs import evolve, frozen
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from dattri_core import InputError, map_tensors
from dattri_influence.functions.layout import Layout

Function: TypeAlias = Callable[..., Tensor]
"""A function of tensors, or nests of them, that returns one number."""
Argnums: TypeAlias = int | Sequence[int]
"""Which arguments a function is differentiated by."""
Values: TypeAlias = tuple[Tensor, ...]
Transpose: TypeAlias = Callable[[Values], Values]


@frozen(eq=False)
class Point:
    """The arguments of a function, some of which it is differentiated by.

    Args:
        function: Returns one number.
        arguments: All of its arguments.
        argnums: Which ones it is differentiated by; vectors are nests like that argument for an
            integer, and tuples of such nests for several.
        layout: Of these arguments.
    """

    function: Function
    arguments: tuple[Any, ...]
    argnums: Argnums
    layout: Layout

    @staticmethod
    def of(function: Function, arguments: Sequence[Any], argnums: Argnums) -> Point:
        """Return the point.

        Raises:
            InputError: There is no such argument, or it does not hold floating point tensors.
        """
        single = isinstance(argnums, int)
        chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        valid = range(len(arguments))
        if not chosen or not set(chosen) <= set(valid) or len(set(chosen)) < len(chosen):
            raise InputError(
                f"argnums: got {argnums!r} for a function of {len(arguments)} arguments; expected "
                f"one or several different numbers from 0 to {len(arguments) - 1}"
            )
        nests = tuple(arguments[position] for position in chosen)
        layout = Layout.of(nests[0] if single else nests, f"arguments {argnums!r}")
        return Point(function, tuple(arguments), argnums if single else chosen, layout)

    def with_arguments(self, arguments: tuple[Any, ...]) -> Point:
        """Return the same function where arguments that it is not differentiated by differ."""
        return evolve(self, arguments=arguments)

    def transpose(self) -> Transpose:
        """Return v -> H v: the derivative of the gradient, transposed, and H is symmetric."""

        def gradient(*values: Tensor) -> Values:
            found: Values = grad(self._value, argnums=tuple(range(len(values))))(*values)
            return found

        with differentiable():
            answer: Any = vjp(gradient, *self.layout.tensors)
        pull: Transpose = answer[1]
        return pull

    def _value(self, *values: Tensor) -> Tensor:
        nest = self.layout.fill(values)
        arguments = list(self.arguments)
        if isinstance(self.argnums, int):
            arguments[self.argnums] = nest
        else:
            for position, item in zip(self.argnums, nest, strict=True):
                arguments[position] = item
        value = self.function(*arguments)
        if not isinstance(value, Tensor) or value.dim() != 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise InputError(
                f"function: returned {got}, expected a tensor of one number, without an axis; sum "
                "or average over the examples"
            )
        return value


def products(transpose: Transpose, vectors: Values, *, many: bool) -> Values:
    """Return H v for one vector, or for several at once."""
    if many and not len(vectors[0]):  # vmap takes no empty axis
        return tuple(vector.clone() for vector in vectors)
    with differentiable():
        return vmap(transpose)(vectors) if many else transpose(vectors)


def differentiable() -> AbstractContextManager[Any]:
    """Choose plain kernels where fused attention has no second derivative."""
    chosen: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)
    return chosen


def held(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Return arguments as constants, so that what is made at a fixed point holds no graph."""
    return tuple(map_tensors(Tensor.detach, argument) for argument in arguments)
