"""Which axis of a tensor counts examples, learned from its shapes at two batch sizes."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen
from torch import Tensor

Shape = tuple[int, ...]
EXAMPLES = 3
"""Of the sample whose shapes are compared with those of one more."""


class UnclearAxisError(Exception):
    """The shapes at two batch sizes name no axis that counts examples."""


@frozen
class Axis:
    """Axis ``at`` counts examples, or B k things: k of each example.

    The k are next to each other (index b k + j), or, when ``strided``, B apart (index j B + b).
    """

    at: int
    several: bool = False
    strided: bool = False

    def split(self, values: Tensor, count: int) -> tuple[Tensor, int]:
        """Return the tensor with axis B k cut in two, and which of the two counts examples."""
        shape, each = list(values.shape), values.shape[self.at] // count
        shape[self.at : self.at + 1] = [each, count] if self.strided else [count, each]
        return values.reshape(shape), self.at + int(self.strided)

    def lead(self, values: Tensor, count: int) -> Tensor:
        """Return the tensor ``[B k, ...]``: the k of each example next to each other, in front."""
        if self.at == 0 and not self.strided:
            return values
        parted, examples = self.split(values, count)
        other = self.at if examples != self.at else self.at + 1
        return parted.movedim((examples, other), (0, 1)).flatten(0, 1)

    def fits(self, shape: Sequence[int], count: int) -> bool:
        """Return whether the axis holds a whole number of things of each example."""
        size = shape[self.at]
        return size % count == 0 and (self.several or size == count)


@frozen
class Spread:
    """How an output that all examples share is repeated for each, so that each has its gradient.

    A position embedding of ``arange(T)`` gives ``[T, D]``, which is added to ``[B, T, D]``. With
    ``new`` > 0 so many axes are put in front, of which the first counts examples; with 0 the axis
    ``at``, of size one, is repeated.
    """

    at: int = 0
    new: int = 0

    def repeat(self, values: Tensor, count: int) -> Tensor:
        """Return the output once for each example; no memory is taken."""
        if self.new:
            return values.expand(count, *[1] * (self.new - 1), *values.shape)
        sizes = list(values.shape)
        sizes[self.at] = count
        return values.expand(sizes)

    def lead(self, grads: Tensor) -> Tensor:
        """Return the gradient of the repeated output as ``[B, *shape of one]``."""
        if self.new:
            return grads.reshape(len(grads), *grads.shape[self.new :])
        return grads.movedim(self.at, 0)

    def lead_inputs(self, inputs: Tensor, count: int) -> Tensor:
        """Return the shared input once for each example, ``[B, ...]``."""
        one = inputs if self.new else inputs.squeeze(self.at)
        return one.expand(count, *one.shape)


def spreads_of(shape: Shape) -> list[Spread]:
    """Return the ways to repeat an output, the likeliest first."""
    # The last axis holds features.
    ones = [Spread(at=at) for at, size in enumerate(shape[:-1]) if size == 1]
    first = [spread for spread in ones if spread.at == 0]
    rest = [spread for spread in ones if spread.at != 0]
    return [*first, Spread(new=1), *rest, Spread(new=2), Spread(new=3)]


def learn_axis(small: Shape, large: Shape, counts: tuple[int, int]) -> Axis | None:
    """Return the axis that counts examples, None if the shapes are equal.

    Args:
        small: At one batch size.
        large: At another.
        counts: The two sizes.

    Raises:
        UnclearAxisError: Several axes change, or one not in proportion to the batch size.
    """
    if len(small) != len(large):
        raise UnclearAxisError
    changed = [at for at in range(len(small)) if small[at] != large[at]]
    if not changed:
        return None
    at = changed[0]
    if len(changed) > 1 or small[at] * counts[1] != large[at] * counts[0]:
        raise UnclearAxisError
    return Axis(at, several=small[at] != counts[0])


@frozen
class CallLayout:
    """One call of a module.

    Args:
        inputs: The axes of its input tensors that count examples.
        outputs: Those of its output tensors.
        signature: The numbers of axes of all of them.
        spreads: How each output is repeated for each example, where all examples share it.
        shared: The outputs with a gradient that examples share and that are not repeated.
    """

    inputs: tuple[Axis | None, ...]
    outputs: tuple[Axis | None, ...]
    signature: tuple[int, ...]
    spreads: tuple[Spread | None, ...]
    shared: tuple[int, ...] = ()

    @property
    def is_spread(self) -> bool:
        """Return whether an output is repeated."""
        return any(spread is not None for spread in self.spreads)

    def spread(self, outputs: Sequence[Tensor], count: int) -> list[Tensor]:
        """Return the outputs, those that examples share once for each."""
        return [
            values if spread is None else spread.repeat(values, count)
            for values, spread in zip(outputs, self.spreads, strict=True)
        ]
