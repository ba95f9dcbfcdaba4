"""Cells: an entrant by a metric in the world of a seed, each with an address of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from dattri_bench.records import address_of
from dattri_bench.request import Entrant, Measure


@frozen(eq=False)
class Cell:
    """One number: an entrant by a metric in the world of a seed.

    Args:
        entrant: The method.
        measure: The metric.
        seed: Of the world.
        attribution: Identity of the scores.
        identity: Of the number.
    """

    entrant: Entrant
    measure: Measure
    seed: int
    attribution: Mapping[str, Any]
    identity: Mapping[str, Any]

    @property
    def address(self) -> str:
        """Return where its record is."""
        return address_of(self.identity)


@frozen(eq=False)
class Finished:
    """A cell and its record."""

    cell: Cell
    record: Mapping[str, Any]
