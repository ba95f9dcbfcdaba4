"""Queries: the test rows of one group, and how far each has come on the way to the train rows.

Resident queries have passed every step. Deferred ones wait where they are smallest, and pass the
rest whenever a train block of the same name arrives: one block at a time, as many rows as a slab
holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from dattri_core.blocks import Block, explain_inner, joins, shape_of
from dattri_core.capabilities import SpectralInverse
from dattri_core.contract import plan_inner
from dattri_core.errors import NumericsError
from dattri_core.protocols import Side
from dattri_core.routes import EXPANSION
from dattri_core.rows import Rows
from dattri_core.stages import Chain, InBasis, Step, pass_steps


@define(eq=False)
class Queries:
    """Test rows of one group, as they wait, and the ways to finish them.

    Args:
        pieces: The rows, in order; resident ones of several variants are in one, one variant after
            another.
        tails: The steps left, for each variant; several differ in their damping.
        sides: What a scorer may read of the finished rows, for each variant.
        variants: Which variants they are, of those of the run.
        device: Where they meet train rows.
        slab: Bytes for rows of one block while they pass a tail; 0: resident, nothing is left.
        place: Of the checkpoint, for messages.
        release: Called after each block: rows in files stop counting as memory.
    """

    pieces: tuple[Rows, ...]
    tails: tuple[tuple[Step, ...], ...]
    sides: tuple[Side, ...]
    variants: tuple[int, ...]
    device: torch.device
    slab: int
    place: str
    release: Callable[[], None] = lambda: None
    _checked: set[str] = field(factory=set)

    def __len__(self) -> int:
        rows = sum(map(len, self.pieces))
        return rows if self.slab else rows // len(self.variants)

    def meet(self, name: str, train: Block | None = None) -> Iterator[tuple[int, slice, Block]]:
        """Yield (variant, range of queries, their finished block) until all have come.

        Args:
            name: Of the block.
            train: Train rows that wait for it: what they would form each time is formed for good.
        """
        if not self.slab:
            block = self.resident(name, train)
            for variant, here in self.apart():
                yield variant, slice(None), block if len(self.variants) == 1 else block.take(here)
            return
        start = 0
        for piece in self.pieces:
            part = piece.select([name])
            step = self._step(part)
            for first in range(0, len(piece), step):
                some = part.take(slice(first, first + step)).to(self.device)
                here = slice(start + first, start + first + len(some))
                for variant, block in self._finished(name, some):
                    yield variant, here, block
                self.release()
            start += len(piece)
        self._checked.add(name)

    def carried(self, name: str, train: Block) -> Block | None:
        """Return train rows, formed, with the step that is left for deferred queries, or None.

        In the basis of a spectral inverse that step is a division D, and <g, D k> = <D g, k>: a
        train batch takes it once, where each query would be formed to take it. None where another
        step is left, several dampings are, or there are more train rows than queries or a slab.
        """
        if not self.slab or len(self.tails) != 1 or len(self.tails[0]) != 1:
            return None
        (step,) = self.tails[0]
        inverse = step.inverse if isinstance(step, InBasis) else None
        if not isinstance(inverse, SpectralInverse) or inverse.spectrum is None:
            return None
        size = len(train) * math.prod(train.shape) * max(4, train.dtype.itemsize)
        if size > self.slab or len(train) > len(self):
            return None
        space = self.pieces[0].space.select([name])
        rows = Rows(space, {name: train}, torch.arange(len(train)))
        return pass_steps((step,), rows).blocks[name]

    def waiting(self, name: str) -> Iterator[tuple[slice, Block]]:
        """Yield (range of queries, their block as it waits) until all have come."""
        start = 0
        for part in self._joined(name):
            step = len(part) if self.device.type == "cpu" else rows_in(self.slab, part)
            for first in range(0, len(part), max(1, step)):
                some = part.take(slice(first, first + step)).to(self.device)
                if name not in self._checked:
                    require_finite_queries(some.blocks, some.index, self.place)
                yield slice(start + first, start + first + len(some)), some.blocks[name]
                self.release()
            start += len(part)
        self._checked.add(name)

    def _joined(self, name: str) -> Iterator[Rows]:
        """Yield the rows of one block: on a processor as many pieces at once as a slab holds.

        Train rows are read from memory once for each, and few columns are no shape for a product.
        """
        parts: list[Rows] = []
        for piece in self.pieces:
            part = piece.select([name])
            together = [*parts, part]
            fits = sum(each.nbytes for each in together) <= self.slab
            one_kind = joins([each.blocks[name] for each in together])
            if parts and not (self.device.type == "cpu" and fits and one_kind):
                yield Rows.concatenate(parts)
                parts = []
            parts.append(part)
        if parts:
            yield Rows.concatenate(parts)

    def prepared(self, name: str, train: Block) -> Block:
        """Return train rows as they best meet the queries: formed once, where all would form them.

        Resident queries meet them at one go, and deferred ones in as many as a slab cuts them into.
        """
        if not self.slab or train.positions in (None, 1):
            return train
        waiting = shape_of(self.pieces[0].blocks[name])
        if any(self.tails):
            waiting = evolve(waiting, positions=None, one_hot=False)
        item = max(4, train.dtype.itemsize)
        fits = len(train) * math.prod(train.shape) * item <= self.slab
        forms = plan_inner(shape_of(train), waiting, item=item).order == "form"
        return train.dense() if fits and forms else train

    def _step(self, part: Rows) -> int:
        if not any(self.tails):
            return len(part)
        return rows_in(self.slab, part)

    def _finished(self, name: str, some: Rows) -> Iterator[tuple[int, Block]]:
        if len(self.tails) > 1:  # formed once for all of them
            some = some.map_blocks(lambda _, block: block.dense())
        for variant, tail in zip(self.variants, self.tails, strict=True):
            block = pass_steps(tail, some).blocks[name]
            if name not in self._checked:
                require_finite_queries({name: block}, some.index, self.place)
            yield variant, block

    def apart(self) -> Iterator[tuple[int, slice]]:
        """Yield (variant, range of its rows) of resident queries."""
        for at, variant in enumerate(self.variants):
            yield variant, slice(at * len(self), (at + 1) * len(self))

    def resident(self, name: str, train: Block | None) -> Block:
        """Return a block of resident queries, of all variants; formed for good where they meet so.

        Args:
            name: Of the block.
            train: Train rows that wait for it.
        """
        (rows,) = self.pieces
        block = rows.blocks[name]
        if train is None or block.positions is None:
            return block
        if explain_inner(train, block).order == "form":
            block = block.dense()
            self.pieces = (rows.map_blocks(lambda n, b: block if n == name else b),)
        return block


@frozen(eq=False)
class Branch:
    """One train side, and the queries that wait at its end.

    Args:
        chain: Whose train side it is.
        queries: Of one variant each, or of all.
        stats: What the inverses of each variant reported when the queries were made.
        chains: Of each variant, where the scorer measures train rows on the test side too.
    """

    chain: Chain
    queries: tuple[Queries, ...]
    stats: Mapping[int, Sequence[Mapping[str, float]]]
    chains: Mapping[int, Chain]

    @property
    def streams(self) -> bool:
        """Return whether train rows pass block by block, on every side that they pass."""
        return self.chain.blockwise and all(c.test_blockwise for c in self.chains.values())


def rows_in(slab: int, part: Rows) -> int:
    """Return how many of these rows, all of one block, a slab holds while they pass a step."""
    item = max(4, part.dtype.itemsize)
    return max(1, slab // (EXPANSION * max(1, part.space.dim) * item))


def require_finite_queries(blocks: Mapping[str, Block], index: Tensor, place: str) -> None:
    """Raise `NumericsError` that names the blocks of queries that are not finite."""
    bad = [name for name, block in blocks.items() if not block.is_finite()]
    if bad:
        raise NumericsError(
            f"queries: not finite after the stages, at checkpoint {place!r}, examples "
            f"{index.tolist()[:8]}..., blocks {bad}; look for a diverged checkpoint, or raise the "
            "damping"
        )
