"""Examples of a sample in another order than it has, where the rows must follow their examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from dattri_core import Block, Evaluator, batch_size, take
from dattri_parts.sources.axes import EXAMPLES

MANY = 8
"""Examples beside each other at bind; of a model as large as `LARGE` only `EXAMPLES`."""
LARGE = 2**30
"""Bytes of a model of which more examples than are compared would take too much memory."""


@frozen(eq=False)
class Mingled:
    """A batch in which the examples stand in another order, and the first of them at both ends.

    Of examples 0, 1, ..., s - 1 it is 0, s - 1, ..., 1, 0. A forward pass that sorts the batch
    puts copies of one example next to each other, so that the rows of one end are those of another
    example; unless all s are alike in what it sorts by, which no order shows.

    Args:
        batch: The examples.
        places: For each of the first examples, where it stands in the batch.
        trio: Of the rows at all these places, those of the sample's first `EXAMPLES` examples.
    """

    batch: Any
    places: tuple[tuple[int, ...], ...]
    trio: Tensor

    @staticmethod
    def of(sample: Any, evaluator: Evaluator, most: int) -> Mingled:
        """Return the examples of a sample that are looked at beside each other."""
        bytes_of = sum(t.nbytes for t in evaluator.parameters.values())
        count = min(batch_size(sample), most if bytes_of < LARGE else EXAMPLES)
        order = [0, *range(count - 1, 0, -1), 0]
        compared = range(min(count, EXAMPLES))
        places = tuple((0, count) if one == 0 else (count - one,) for one in compared)
        rows = [0 if one == 0 else one + 1 for one in (at % count for at in range(EXAMPLES))]
        return Mingled(take(sample, torch.tensor(order)), places, torch.tensor(rows))

    def __len__(self) -> int:
        return batch_size(self.batch)

    @property
    def index(self) -> Tensor:
        """Return the places of the batch whose rows are compared."""
        return torch.tensor([place for where in self.places for place in where])

    def first_rows(self, rows: Mapping[str, Block]) -> dict[str, Block]:
        """Return the rows of the sample's first examples, of those at the places compared."""
        return {name: block.take(self.trio) for name, block in rows.items()}
