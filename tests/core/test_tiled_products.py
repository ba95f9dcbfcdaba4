"""Inner products in tiles: every row, output and input once, whatever the tiles; in their room."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dattri_core.blocks import tiled
from dattri_core.blocks.inputs import Shared
from dattri_core.blocks.tiled import inner_in_tiles, tile_of

COUNTS = st.integers(1, 9)


def expected(outputs: Tensor, inputs: Tensor, formed: Tensor) -> Tensor:
    """Return the inner products in float64, each row formed as a whole."""
    rows = torch.einsum("bto,bti->boi", outputs.double(), inputs.double())
    return rows.flatten(1) @ formed.double().flatten(1).T


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(COUNTS, COUNTS, COUNTS, COUNTS, COUNTS),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    copy=st.sampled_from([0, 1, 10**6]),
    limit=st.sampled_from([1, 64, 400, 2**20]),
)
def test_every_cut_gives_the_products_of_whole_rows(
    sizes: tuple[int, ...], tile: tuple[int, ...], copy: int, limit: int
) -> None:
    """Tiles of any size, of cut inputs and of all."""
    b, t, o, i, c = sizes
    outputs, inputs, formed = drawn(0, b, t, o), drawn(1, b, t, i), drawn(2, c, o, i)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("ROWS", "OUTPUTS", "INPUTS", "COPY"), (*tile, copy), strict=True):
            patch.setattr(tiled, name, value)
        found = inner_in_tiles(outputs, inputs, formed.flatten(1), limit)
    torch.testing.assert_close(found, expected(outputs, inputs, formed), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [3, 70])
@pytest.mark.parametrize("rows", [5, 131])
def test_tiles_as_they_are_give_the_products_of_whole_rows(rows: int, count: int) -> None:
    """More rows, outputs and inputs than a tile has, all of them uneven."""
    outputs, inputs = drawn(0, rows, 40, 71), drawn(1, rows, 40, 1301)
    formed = drawn(2, count, 71, 1301)
    found = inner_in_tiles(outputs, inputs, formed.flatten(1), 2**28)
    torch.testing.assert_close(found, expected(outputs, inputs, formed), rtol=1e-10, atol=1e-9)


def test_shared_inputs_are_met_as_their_own() -> None:
    """Rows that have their inputs in common, in an order of their own."""
    held, index = drawn(1, 4, 3, 700), torch.tensor([2, 0, 2, 3, 1, 0, 2])
    outputs, formed = drawn(0, 7, 3, 5), drawn(2, 2, 5, 700)
    found = inner_in_tiles(outputs, Shared(held, index), formed.flatten(1), 2**28)
    torch.testing.assert_close(found, expected(outputs, held[index], formed))


def test_half_precision_is_summed_in_float32() -> None:
    """Products of bfloat16 rows are those of their values, not of rounded sums."""
    outputs, inputs = (drawn(k, 3, 64, 80, dtype=torch.bfloat16) for k in (0, 1))
    formed = drawn(2, 2, 80, 80, dtype=torch.float32)
    found = inner_in_tiles(outputs, inputs, formed.flatten(1), 2**28)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), expected(outputs, inputs, formed), rtol=1e-5, atol=1e-2
    )


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 3000),
    positions=st.integers(1, 1024),
    outputs=st.integers(1, 5000),
    inputs=st.integers(1, 5000),
    met=st.integers(1, 3000),
    limit=st.integers(2**10, 2**30),
    device=st.booleans(),
)
def test_a_tile_and_what_it_meets_take_their_room(
    rows: int, positions: int, outputs: int, inputs: int, met: int, limit: int, device: bool
) -> None:
    """No more bytes than the limit, unless one number of a row is more; nothing is left out."""
    tile = tile_of(rows, positions, outputs, inputs, met, 4, limit, device=device)
    assert 1 <= tile.rows <= rows
    assert 1 <= tile.outputs <= outputs
    assert 1 <= tile.inputs <= inputs
    numbers = tile.outputs * tile.inputs
    if device:
        assert tile.inputs == inputs
        assert 4 * tile.rows * numbers <= limit or tile.rows * tile.outputs == 1
    else:
        assert 4 * (tile.rows + met) * numbers <= limit or numbers == 1


@pytest.mark.parametrize(
    ("outputs", "inputs", "positions"), [(512, 4608, 64), (384, 1536, 64), (128, 1153, 1024)]
)
def test_both_products_of_a_tile_have_long_sides(outputs: int, inputs: int, positions: int) -> None:
    """On a processor a layer with many inputs is not cut to a few of its outputs."""
    tile = tile_of(256, positions, outputs, inputs, 50, 4, 2**28)
    assert min(tile.rows, tile.outputs) >= 48
    assert math.prod((tile.rows, tile.outputs, tile.inputs)) * 4 <= 16 * 2**20
