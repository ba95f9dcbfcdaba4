"""Tiles: states that survive a stop, in memory and in a folder; foreign and stale folders."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dattri_core import StoreError
from dattri_core.tiles import FolderTiles, MemoryTiles, budget_of, open_tiles, shards

FACTS = {"method": {"scorer": "dot"}, "weights": ["abc"], "train": "t", "test": "u"}
LAYOUT = {"shard": 4, "query_group": 3, "budget": 2**20}


def state(value):
    return {"sum": torch.full((2, 3), value, dtype=torch.float64), "weight": torch.arange(2.0)}


def equal(left, right):
    return set(left) == set(right) and all(torch.equal(left[k], right[k]) for k in left)


@given(st.integers(0, 50), st.integers(1, 60))
def test_shards_cover_every_row_once_and_are_as_large_as_asked(n, size):
    cut = shards(n, size)
    assert [row for start, stop in cut for row in range(start, stop)] == list(range(n))
    assert all(stop - start == size for start, stop in cut[:-1])


@pytest.mark.parametrize("make", [lambda _: MemoryTiles(), FolderTiles])
def test_a_tile_holds_the_last_state_put_and_counts_its_checkpoints(make, tmp_path):
    tiles = make(tmp_path)
    assert tiles.done(0, 8) == 0
    assert tiles.get(0, 8) is None
    for done in (1, 2, 11):  # 11 sorts before 2 as text
        tiles.put(0, 8, done, state(done))
        tiles.put(1, 8, 1, state(-1.0))
        assert tiles.done(0, 8) == done
        assert equal(tiles.get(0, 8), state(done))
    assert tiles.done(1, 8) == 1
    assert tiles.done(0, 0) == 0


def test_a_tile_in_memory_is_forgotten_when_it_is_dropped():
    tiles = MemoryTiles()
    tiles.put(0, 0, 1, state(1.0))
    tiles.put(0, 4, 1, state(1.0))
    tiles.drop(0, 0)
    assert tiles.get(0, 0) is None
    tiles.close()
    assert tiles.get(0, 4) is None


def test_states_of_any_layout_come_back_bit_for_bit(tmp_path):
    values = torch.randn(5, 4, dtype=torch.float64).T[:, 1:]
    assert not values.is_contiguous()
    tiles = FolderTiles(tmp_path)
    tiles.put(0, 0, 1, {"sum": values, "half": values.bfloat16()})
    found = tiles.get(0, 0)
    assert torch.equal(found["sum"], values)
    assert torch.equal(found["half"], values.bfloat16())
    assert found["half"].dtype == torch.bfloat16


def test_a_new_state_replaces_the_file_of_the_one_before(tmp_path):
    tiles = FolderTiles(tmp_path)
    for done in (1, 2, 3):
        tiles.put(0, 0, done, state(done))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_kill_between_writing_the_new_state_and_removing_the_old_loses_nothing(tmp_path):
    tiles = FolderTiles(tmp_path)
    tiles.put(0, 0, 1, state(1.0))
    (old,) = tmp_path.iterdir()
    kept = old.read_bytes()
    tiles.put(0, 0, 2, state(2.0))
    old.write_bytes(kept)
    (tmp_path / ".g00000_s000000000_c00003.safetensors.partial-12ab").write_bytes(b"half")
    assert tiles.done(0, 0) == 2
    assert equal(tiles.get(0, 0), state(2.0))
    tiles.put(0, 0, 3, state(3.0))
    assert equal(tiles.get(0, 0), state(3.0))


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_tile_is_refused_and_named(tmp_path, keep):
    tiles = FolderTiles(tmp_path)
    tiles.put(0, 0, 1, state(1.0))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=rf"{path.name}.*cannot be read.*delete this file"):
        tiles.get(0, 0)


# --- opening a run ------------------------------------------------------------------------------
def test_a_run_is_resumed_with_the_layout_it_began_with(tmp_path):
    folder = tmp_path / "scores.run"
    tiles, layout = open_tiles(folder, FACTS, LAYOUT)
    assert layout == LAYOUT
    tiles.put(0, 4, 1, state(4.0))
    later = {"shard": 100, "query_group": 7, "budget": 2**30}
    tiles, layout = open_tiles(folder, FACTS, later)
    assert layout == LAYOUT
    assert equal(tiles.get(0, 4), state(4.0))
    assert budget_of(folder, 5) == 2**20
    assert budget_of(tmp_path / "none", 5) == 5


@pytest.mark.parametrize(
    ("fact", "value", "shown"),
    [
        ("method", {"scorer": "cosine"}, r'"cosine"'),
        ("weights", ["abd"], r'\["abc"\] then, \["abd"\] now'),
        ("train", "other", r'"t" then, "other" now'),
        ("test", "other", r'"u" then'),
    ],
)
def test_a_stale_folder_is_refused_with_what_differs(tmp_path, fact, value, shown):
    folder = tmp_path / "scores.run"
    open_tiles(folder, FACTS, LAYOUT)
    with pytest.raises(StoreError, match=rf"another {fact} \({fact}: .*{shown}.*delete it"):
        open_tiles(folder, {**FACTS, fact: value}, LAYOUT)
    open_tiles(folder, FACTS, LAYOUT)


def test_a_fact_that_the_run_did_not_know_of_makes_it_stale(tmp_path):
    open_tiles(tmp_path / "run", FACTS, LAYOUT)
    with pytest.raises(StoreError, match="another loss"):
        open_tiles(tmp_path / "run", {**FACTS, "loss": "mse"}, LAYOUT)


def test_long_facts_are_cut_in_the_message(tmp_path):
    open_tiles(tmp_path / "run", {"parameters": ["weight"] * 1000}, LAYOUT)
    with pytest.raises(StoreError) as caught:
        open_tiles(tmp_path / "run", {"parameters": ["bias"] * 1000}, LAYOUT)
    assert len(str(caught.value)) < 600


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 0.99))
def test_a_truncated_manifest_is_refused(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("tiles")
    open_tiles(folder / "run", FACTS, LAYOUT)
    manifest = folder / "run" / "run.json"
    text = manifest.read_bytes()
    manifest.write_bytes(text[: int(share * len(text))])
    with pytest.raises(StoreError, match=r"run\.json is truncated or foreign"):
        open_tiles(folder / "run", FACTS, LAYOUT)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        '{"format": "else"}',
        '{"format": "dattri-run", "facts": {}}',
        '{"format": "dattri-run", "facts": {}, "layout": {"shard": "4"}}',
        '{"format": "dattri-run", "facts": {}, "layout": {"shard": 0}}',
        '{"format": "dattri-run", "facts": [], "layout": {}}',
        '{"format": "dattri-run", "facts": {}, "layout": []}',
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path, content):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(content)
    with pytest.raises(StoreError, match=r"truncated or foreign"):
        open_tiles(folder, FACTS, LAYOUT)


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"it is not empty and has no run\.json"):
        open_tiles(tmp_path, FACTS, LAYOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(StoreError, match="a file has this name"):
        open_tiles(tmp_path / "thesis.txt", FACTS, LAYOUT)


def test_a_kill_while_the_manifest_was_written_does_not_block_the_folder(tmp_path):
    (tmp_path / ".run.json.partial-00ff00ff").write_text('{"format"')
    open_tiles(tmp_path, FACTS, LAYOUT)
    assert json.loads((tmp_path / "run.json").read_text())["facts"] == FACTS


def test_closing_removes_all_tiles_at_once(tmp_path, monkeypatch):
    """A kill in the middle of it must not leave a part, which would be computed again."""
    folder = tmp_path / "run"
    tiles, _ = open_tiles(folder, FACTS, LAYOUT)
    for start in range(0, 40, 4):
        tiles.put(0, start, 1, state(1.0))

    def killed(*_, **__):
        raise SystemExit

    monkeypatch.setattr("dattri_core.atomic.shutil.rmtree", killed)
    with pytest.raises(SystemExit):
        tiles.close()
    assert not folder.exists()
    monkeypatch.undo()
    tiles, _ = open_tiles(folder, FACTS, LAYOUT)
    assert tiles.done(0, 0) == 0
    tiles.close()
    assert not folder.exists()
