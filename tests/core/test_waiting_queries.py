"""Deferred queries meet train rows a few pieces at a time: as many as a slab holds, none formed."""

import pytest
import torch

from dattri_core import BlockSpec, Space
from dattri_core.blocks import DenseBlock, OuterBlock
from dattri_core.queries import Queries
from dattri_core.rows import Rows

INPUTS, OUTPUTS = 5, 4
SPACE = Space((BlockSpec("other", "dense", (3,)), BlockSpec("layer", "outer", (OUTPUTS, INPUTS))))


def piece(count, positions, first, dense=False):
    generator = torch.Generator().manual_seed(first)
    outputs = torch.randn(count, positions, OUTPUTS, generator=generator)
    inputs = torch.randn(count, positions, INPUTS, generator=generator)
    block = OuterBlock(outputs, inputs)
    other = DenseBlock(torch.randn(count, 3, generator=generator))
    blocks = {"other": other, "layer": block.dense() if dense else block}
    return Rows(SPACE, blocks, torch.arange(first, first + count))


def waiting(pieces, slab, released=None):
    queries = Queries(
        pieces=tuple(pieces),
        tails=((),),
        sides=(),
        variants=(0,),
        device=torch.device("cpu"),
        slab=slab,
        place="0",
        release=(lambda: None) if released is None else (lambda: released.append(1)),
    )
    return list(queries.waiting("layer"))


def bytes_of(count, positions=2):
    return 4 * count * positions * (INPUTS + OUTPUTS)


@pytest.mark.parametrize(
    ("slab", "want"),
    [
        (bytes_of(12), [(0, 12)]),
        (bytes_of(11), [(0, 7), (7, 12)]),
        (bytes_of(6), [(0, 3), (3, 7), (7, 12)]),
        (1, [(0, 3), (3, 7), (7, 12)]),  # a piece that is more than a slab comes alone
    ],
)
def test_as_many_pieces_as_a_slab_holds_come_at_once(slab, want):
    pieces = [piece(3, 2, 0), piece(4, 2, 3), piece(5, 2, 7)]
    released = []
    found = waiting(pieces, slab, released)
    assert [(where.start, where.stop) for where, _ in found] == want
    assert len(released) == len(want)
    assert all(isinstance(block, OuterBlock) for _, block in found)
    flat = torch.cat([block.flat() for _, block in found])
    assert torch.equal(flat, torch.cat([one.blocks["layer"].flat() for one in pieces]))


def test_pieces_of_two_kinds_or_lengths_stay_as_they_are():
    """Joined they would be formed, or padded: more bytes than were counted."""
    pieces = [piece(3, 2, 0), piece(4, 3, 3), piece(5, 3, 7), piece(2, 2, 12, dense=True)]
    found = waiting(pieces, 2**20)
    assert [(where.start, where.stop) for where, _ in found] == [(0, 3), (3, 12), (12, 14)]
    kinds = [type(block) for _, block in found]
    assert kinds == [OuterBlock, OuterBlock, DenseBlock]
    assert [block.positions for _, block in found[:2]] == [2, 3]
