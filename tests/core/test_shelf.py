"""Rows in files: the same numbers, no memory once they are released, nothing left behind."""

import tempfile
from pathlib import Path

import pytest
import torch
from oracles.blocks import KINDS, make

from dattri_core import DenseBlock, OneHot, OuterBlock, Rows, StoreError
from dattri_core.blocks import SpanBlock
from dattri_core.shelf import Shelf, free_on_disk
from dattri_core.space import BlockSpec, Space

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def rows_of(blocks):
    """Return rows whose positions and auxiliary numbers tell them apart."""
    count = len(blocks[0])
    specs = (
        BlockSpec(f"b{k}", "dense" if b.positions is None else "outer", b.shape)
        for k, b in enumerate(blocks)
    )
    named = {f"b{k}": block for k, block in enumerate(blocks)}
    index = torch.arange(count) + 7
    return Rows(Space(tuple(specs)), named, index, {"loss": torch.rand(count)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_kind_come_back_bit_for_bit(dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for kinds in (KINDS, *((kind,) for kind in KINDS)):
        blocks = [make(kind, 5, 3, 4, 6, generator, dtype)[0] for kind in kinds]
        rows = rows_of(blocks)
        shelf = Shelf(tmp_path)
        read = shelf.put(rows)
        assert read.space == rows.space
        assert torch.equal(read.index, rows.index)
        assert torch.equal(read.aux["loss"], rows.aux["loss"])
        for _ in range(2):
            for before, after in zip(rows.blocks.values(), read.blocks.values(), strict=True):
                assert type(after) is type(before)
                assert after.dtype == before.dtype
                assert torch.equal(after.dense().values, before.dense().values)
            shelf.release()
    assert not list(tmp_path.iterdir())


def test_no_rows_and_empty_blocks(tmp_path):
    for count, size in ((0, 3), (2, 0)):
        read = Shelf(tmp_path).put(rows_of([DenseBlock(torch.ones(count, size))]))
        assert read.blocks["b0"].dense().values.shape == (count, size)


def test_what_blocks_have_in_common_stays_in_memory():
    """The base of a span is held once, by whoever made it."""
    base = DenseBlock(torch.rand(4, 2, 3))
    read = Shelf().put(rows_of([SpanBlock(torch.rand(5, 4), base)]))
    assert read.blocks["b0"].base is base


def test_indices_are_not_turned_into_vectors(tmp_path):
    block = OuterBlock(torch.rand(5, 3, 4), OneHot(torch.randint(9, (5, 3)), 9))
    read = Shelf(tmp_path).put(rows_of([block])).blocks["b0"]
    assert isinstance(read.inputs, OneHot)
    assert read.inputs.index.dtype == torch.int64
    assert torch.equal(read.inputs.index, block.inputs.index)


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return 4096 * pages


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory of Linux")
def test_released_rows_are_no_memory_of_the_process(tmp_path):
    size = 64 * 2**20
    shelf = Shelf(tmp_path)
    rows = shelf.put(rows_of([DenseBlock(torch.rand(16, size // 64))]))
    shelf.release()
    before = resident_bytes()
    total = rows.blocks["b0"].values.double().sum(1)
    read = resident_bytes()
    shelf.release()
    after = resident_bytes()
    assert read - before > 0.8 * size
    assert after - before < 0.2 * size
    assert torch.equal(total, rows.blocks["b0"].values.double().sum(1))


def test_room_is_free_again_when_rows_are_gone(tmp_path):
    shelf = Shelf(tmp_path)
    rows = shelf.put(rows_of([DenseBlock(torch.rand(3, 5))]))
    assert len(shelf._maps) == 1
    del rows
    assert not len(shelf._maps)


def test_a_full_disk_is_an_error_that_says_what_helps(monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def tell(self):
            return 0

        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    rows = rows_of([DenseBlock(torch.rand(3, 1000))])
    with pytest.raises(StoreError) as caught:
        Shelf(Path("/runs")).put(rows)
    message = str(caught.value)
    for part in ("queries on disk", "11.7 KiB of 3 queries", "'/runs'", "No space left", "memory="):
        assert part in message


def test_the_room_of_a_folder_that_is_not_there_yet(tmp_path):
    there = free_on_disk(tmp_path / "a" / "b.run")
    assert there > 0
    assert abs(there - free_on_disk(tmp_path)) < 0.01 * there
