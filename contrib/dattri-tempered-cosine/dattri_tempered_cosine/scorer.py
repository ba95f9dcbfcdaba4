"""Inner products of rows over powers of their norms."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from dattri_core import Block, Scored, Side, SpecError


def _in_unit_interval(instance: object, attribute: object, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"power is {value}, expected a number from 0 (dot) to 1 (cosine)")


@frozen
class TemperedCosine:
    """S_ij = <g_i, h_j> / (|g_i|^p |h_j|^q) with powers p and q from 0 to 1.

    The inner product (p = q = 0) is ruled by the few train examples with large gradients, often
    outliers; the cosine (p = q = 1) forgets how hard an example was. In between, large gradients
    count for more, but not in proportion. A row that vanishes scores 0.

    Args:
        train_power: p, how much of the train row's norm is divided out.
        test_power: q, how much of the test row's norm is divided out; it changes no ranking of
            train examples, only the scale of each test column.
    """

    train_power: float = field(default=0.5, validator=_in_unit_interval)
    test_power: float = field(default=0.5, validator=_in_unit_interval)
    needs: ClassVar[frozenset[str]] = frozenset({"norm"})
    locality: ClassVar[Literal["tile", "column"]] = "tile"

    def pair(self, train: Block, test: Block) -> Tensor:
        """Return the inner products ``[B, C]`` of one block."""
        return train.inner(test)

    def finish(self, total: Tensor, train: Side, test: Side) -> Scored:
        """Return the sum over blocks divided by the powers of both norms."""
        left = _divisor(train.norm, self.train_power)
        right = _divisor(test.norm, self.test_power)
        return Scored(total / (left[:, None] * right[None, :]))


def _divisor(norm: Tensor | None, power: float) -> Tensor:
    """Return norm^power, ``[B]``, and 1 for a row that vanishes: its inner products are 0."""
    if norm is None:
        raise SpecError("scorer tempered-cosine: was given no norms, although it needs them")
    return torch.where(norm > 0, norm, torch.ones_like(norm)).pow(power)
