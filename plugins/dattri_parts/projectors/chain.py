"""Projectors one after another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import evolve, field, frozen, validators

from dattri_core import (
    DataProjector,
    LinearMap,
    Projector,
    RandomStream,
    Rows,
    Space,
    SpecError,
)
from dattri_parts.projectors.sides import MEAN


@frozen
class Chain:
    """P = P_m ... P_2 P_1, each a sketch of what the one before it leaves.

    Inner products are unbiased where those of every part are, since the parts are independent: each
    place in the chain has random numbers of its own. What the chain gives is what all parts give.

    Args:
        parts: In the order in which rows pass them. Spelled ``{"name": "chain", "parts": ["mask",
            {"name": "sjlt", "dim": 512}]}``; a field of a part is ``parts.1.dim``, or ``dim``
            where one part alone has it.
    """

    parts: tuple[Projector, ...] = field(validator=validators.min_len(1))

    @property
    def gives(self) -> frozenset[str]:
        """Return what all parts give."""
        return frozenset.intersection(*(frozenset(part.gives) for part in self.parts))

    @property
    def expected_failures(self) -> Mapping[str, str]:
        """Return which laws of random maps do not hold of a part, and so of the whole."""
        found: dict[str, str] = {}
        for part in self.parts:
            said: Mapping[str, str] = getattr(part, "expected_failures", {})
            found |= {law: why for law, why in said.items() if law == MEAN}
        return found

    def out_space(self, space: Space) -> Space:
        """Return the space after the last part.

        Raises:
            SpecError: A part cannot take what the part before it leaves, or is fitted on data.
        """
        for position, part in enumerate(self.parts):
            if isinstance(part, DataProjector) and part.needs:
                raise SpecError(
                    f"projector 'chain': part {position} ({type(part).__name__}) is fitted on the "
                    "train set, and a chain is built from random numbers; give it as a stage of "
                    "its own: stages=[{'projector': ...}, {'projector': ...}, ...]"
                )
            space = part.out_space(space)
        return space

    def build(self, space: Space, *, stream: RandomStream, device: torch.device) -> LinearMap:
        """Return the maps of all parts as one.

        Raises:
            SpecError: A part is fitted on data.
        """
        self.out_space(space)
        maps: list[LinearMap] = []
        for position, part in enumerate(self.parts):
            before = maps[-1].out_space if maps else space
            maps.append(part.build(before, stream=stream_of(stream, position), device=device))
        return ChainMap(space, tuple(maps))


def stream_of(stream: RandomStream, position: int) -> RandomStream:
    """Return the random numbers of the part at a place of a chain, which may be inside another."""
    return evolve(stream, role=f"{stream.role}/{position}")


@frozen(eq=False)
class ChainMap:
    """P_m ... P_1 g for every row, and its adjoint P_1^T ... P_m^T k.

    Args:
        in_space: Of rows.
        maps: In the order in which rows pass them.
    """

    in_space: Space
    maps: tuple[LinearMap, ...]

    @property
    def out_space(self) -> Space:
        """Return the space after the last map."""
        return self.maps[-1].out_space

    @property
    def blockwise(self) -> bool:
        """Return whether all maps are."""
        return all(step.blockwise for step in self.maps)

    @property
    def is_identity(self) -> bool:
        """Return whether all maps leave rows as they are."""
        return all(getattr(step, "is_identity", False) for step in self.maps)

    @property
    def additive(self) -> bool:
        """Return whether rows may come in parts of their blocks, and what these give be added up.

        So it is where an additive map comes first, or after blockwise ones: those after it are
        linear.
        """
        for step in self.maps:
            if getattr(step, "additive", False):
                return True
            if not step.blockwise:
                return False
        return False

    def map(self, rows: Rows) -> Rows:
        """Return P g for every row g; of a part of its blocks, where the chain takes parts."""
        self.in_space.select(rows.space.names).require_same(rows.space, "projector 'chain'")
        mapped = rows
        for step in self.maps:
            mapped = step.map(mapped)
            if not mapped.blocks and self.additive:  # of blocks that a blockwise map drops
                return self._zero(rows)
        return mapped

    def adjoint(self, rows: Rows) -> Rows:
        """Return P^T k for every mapped row k."""
        for step in reversed(self.maps):
            rows = step.adjoint(rows)
        return rows

    def _zero(self, rows: Rows) -> Rows:
        dtype = torch.promote_types(rows.dtype, torch.float32)
        flat = torch.zeros(len(rows), self.out_space.dim, dtype=dtype, device=rows.device)
        return Rows.from_flat(self.out_space, flat, rows.index, rows.aux)
