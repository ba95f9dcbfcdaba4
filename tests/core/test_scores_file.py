"""Scores on disk: bit-exact, whole or absent, never a pickle, never loaded whole."""

import json
import os
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dattri_core.errors import NumericsError, StoreError
from dattri_core.scores import Scores
from dattri_core.scores_writer import ScoresWriter

FACTS = {"target": {"name": "loss", "higher_is_better": False}, "note": "λ"}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path):
    values = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    scores = Scores(values, [f"t{i}" for i in range(30)], None, FACTS)
    scores.save(tmp_path / "scores")
    return scores, tmp_path / "scores"


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 6), st.integers(0, 5), st.sampled_from(["float16", "float32", "float64"]),
    st.booleans(), st.integers(0, 2**32),
)  # fmt: skip
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path_factory, n, m, dtype, mapped, seed):
    folder = tmp_path_factory.mktemp("scores") / "s"
    bits = {"float16": np.uint16, "float32": np.uint32, "float64": np.uint64}[dtype]
    raw = np.random.default_rng(seed).integers(0, np.iinfo(bits).max, (n, m), bits, endpoint=True)
    values = raw.view(dtype)
    values[~np.isfinite(values)] = -0.0
    scores = Scores(values, [f"t{i}" for i in range(n)], None, FACTS)
    scores.save(folder)
    back = Scores.load(folder, mmap=mapped)
    assert np.array_equal(np.asarray(back.values).view(bits), values.view(bits))
    assert back.train_ids == scores.train_ids
    assert back.test_ids == scores.test_ids == range(m)
    assert dict(back.provenance) == {**FACTS, "n_train": n}
    assert isinstance(back.values, np.memmap) == (mapped and n * m > 0)


def test_mapped_scores_answer_like_loaded_ones(saved):
    scores, folder = saved
    mapped, loaded = Scores.load(folder), Scores.load(folder, mmap=False)
    for each in (mapped, loaded):
        assert np.array_equal(each.top(3).ids, scores.top(3).ids)
        assert each.bottom(3, test=1).ids == scores.bottom(3, test=1).ids
        assert torch.equal(each.removal_effect(), scores.removal_effect())
        assert torch.equal(each.mean_over_tests(), scores.mean_over_tests())
        for key in (
            slice(3, 9),
            [5, 2],
            (slice(None), [3, 0]),
            ([1, 2], slice(0, 2)),
            ([7, 1], [2]),
        ):
            assert np.array_equal(np.asarray(each[key].values), np.asarray(scores[key].values))
            assert list(each[key].train_ids) == list(scores[key].train_ids)
    assert "on disk" in repr(mapped)


def test_a_slice_of_mapped_scores_can_be_saved_and_sliced_again(saved, tmp_path):
    scores, folder = saved
    Scores.load(folder)[5:20][2:4, 1:].save(tmp_path / "part")
    part = Scores.load(tmp_path / "part")
    assert np.array_equal(np.asarray(part.values), scores.values[7:9, 1:].numpy())
    assert part.provenance["n_train"] == 30


def test_bfloat16_is_kept_exactly_as_float32(tmp_path):
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    Scores(values).save(tmp_path / "s")
    assert np.array_equal(np.asarray(Scores.load(tmp_path / "s").values), values.float().numpy())


# --- damage -------------------------------------------------------------------------------------
def edit(folder, **changes):
    path = folder / "scores.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate_values(folder):
    data = (folder / "values.npy").read_bytes()
    (folder / "values.npy").write_bytes(data[:-7])


def truncate_header(folder):
    (folder / "values.npy").write_bytes((folder / "values.npy").read_bytes()[:20])


def flip_a_bit(folder):
    data = bytearray((folder / "values.npy").read_bytes())
    data[-3] ^= 1
    (folder / "values.npy").write_bytes(bytes(data))


def other_values(folder):
    np.save(folder / "values.npy", np.zeros((4, 30), np.float32))


def other_dtype(folder):
    np.save(folder / "values.npy", np.zeros((30, 4), np.float64))


class Bomb:
    def __reduce__(self):
        return (os.abort, ())


def object_array(folder):
    array = np.empty((30, 4), dtype=object)
    array[:] = None
    array[0, 0] = Bomb()
    np.save(folder / "values.npy", array, allow_pickle=True)


def bare_pickle(folder):
    (folder / "values.npy").write_bytes(pickle.dumps(Bomb()))


def column_order(folder):
    np.save(folder / "values.npy", np.asfortranarray(np.zeros((30, 4), np.float32)))


def remove_values(folder):
    (folder / "values.npy").unlink()


def remove_manifest(folder):
    (folder / "scores.json").unlink()


def truncate_manifest(folder):
    text = (folder / "scores.json").read_text()
    (folder / "scores.json").write_text(text[: len(text) // 2])


def not_text(folder):
    (folder / "scores.json").write_bytes(b"\xff\xfe\x00")


DAMAGE = [
    (truncate_values, "truncated"),
    (truncate_header, "not a .npy file"),
    (flip_a_bit, "SHA-256"),
    (other_values, "different results"),
    (other_dtype, "different results"),
    (object_array, "pickled Python objects"),
    (bare_pickle, "not a .npy file"),
    (column_order, "column by column"),
    (remove_values, "no such file"),
    (remove_manifest, "has no scores.json"),
    (truncate_manifest, "not JSON"),
    (not_text, "not JSON"),
    (lambda f: (f / "scores.json").write_text("[1]"), "format is not"),
    (lambda f: (f / "scores.json").write_text('{"name": "package"}'), "format is not"),
    (lambda f: edit(f, version=2), "version is 2"),
    (lambda f: edit(f, shape=[30]), "two counts"),
    (lambda f: edit(f, shape=[30, -4]), "two counts"),
    (lambda f: edit(f, dtype="object"), "two counts"),
    (lambda f: edit(f, sha256=None), "sha256"),
    (lambda f: edit(f, provenance=[]), "provenance"),
    (lambda f: edit(f, train_ids=["a"]), "30 different ids"),
    (lambda f: edit(f, train_ids=["a"] * 30), "30 different ids"),
    (lambda f: edit(f, test_ids=[1.5, 2, 3, 4]), "4 different ids"),
    (lambda f: edit(f, test_ids=[[], 2, 3, 4]), "4 different ids"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
@pytest.mark.parametrize("mapped", [True, False])
def test_damage_is_refused_with_its_reason(saved, damage, message, mapped):
    _, folder = saved
    damage(folder)
    with pytest.raises(StoreError, match=message):
        Scores.load(folder, mmap=mapped)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StoreError, match="no such folder"):
        Scores.load(tmp_path / "nowhere")


def test_values_with_a_matching_checksum_are_still_checked(saved):
    import hashlib

    _, folder = saved
    values = np.zeros((30, 4), np.float32)
    values[4, 1] = np.nan
    np.save(folder / "values.npy", values)
    edit(folder, sha256=hashlib.sha256((folder / "values.npy").read_bytes()).hexdigest())
    with pytest.raises(NumericsError, match="train position 4"):
        Scores.load(folder)


# --- saving is atomic ---------------------------------------------------------------------------
def test_saving_again_replaces_also_the_folder_it_was_read_from(saved):
    scores, folder = saved
    Scores.load(folder)[:10].save(folder)
    assert np.array_equal(np.asarray(Scores.load(folder).values), scores.values[:10].numpy())
    assert names(folder.parent) == ["scores"]


def test_a_foreign_folder_is_refused_and_untouched(saved, tmp_path):
    scores, folder = saved
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds other files"):
        scores.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="a file has this name"):
        scores.save(tmp_path / "file")


@pytest.mark.parametrize("manifest", ["{}", "[]", "not json", '{"format": "other"}'])
def test_a_folder_of_the_same_file_names_is_foreign_too(saved, manifest):
    scores, folder = saved
    (folder / "scores.json").write_text(manifest)
    with pytest.raises(StoreError, match="holds other files"):
        scores.save(folder)
    assert (folder / "scores.json").read_text() == manifest


def test_ctrl_c_while_saving_keeps_the_old_scores(saved, monkeypatch):
    scores, folder = saved
    import dattri_core.scores_file as module

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sha256_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        scores[:5].save(folder)
    monkeypatch.undo()
    assert names(folder.parent) == ["scores"]
    assert Scores.load(folder).shape == (30, 4)


# --- written as they come -----------------------------------------------------------------------
def test_a_writer_streams_to_a_folder(tmp_path):
    want = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    with ScoresWriter(tmp_path / "s", 40, 6) as writer:
        for start in (32, 0, 16, 8, 24):  # any order
            writer.values[start : start + 8] = want[start : start + 8].numpy()
            writer.release()
        assert not (tmp_path / "s").exists()
        scores = writer.finish(test_ids=list("abcdef"), provenance=FACTS)
    assert names(tmp_path) == ["s"]
    assert isinstance(scores.values, np.memmap)
    for each in (scores, Scores.load(tmp_path / "s")):
        assert np.array_equal(np.asarray(each.values), want.numpy())
        assert each.test_ids == tuple("abcdef")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, None])
def test_an_unfinished_writer_leaves_nothing(tmp_path, error):
    def work():
        with ScoresWriter(tmp_path / "s", 4, 2) as writer:
            writer.values[:] = 1
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert names(tmp_path) == []


def test_a_writer_refuses_values_that_are_not_finite(tmp_path):
    with (
        pytest.raises(NumericsError, match="train position 3"),
        ScoresWriter(tmp_path / "s", 4, 2) as writer,
    ):
        writer.values[3, 1] = np.nan
        writer.finish()
    assert names(tmp_path) == []


def test_a_writer_refuses_a_foreign_folder_at_once(tmp_path):
    (tmp_path / "cat.jpg").write_text("cat")
    with pytest.raises(StoreError, match="holds other files"):
        ScoresWriter(tmp_path, 4, 2)


# --- memory -------------------------------------------------------------------------------------
def test_top_of_mapped_scores_allocates_far_less_than_the_matrix(tmp_path):
    n, m = 30_000, 200  # 24 MB
    rng = np.random.default_rng(0)
    with ScoresWriter(tmp_path / "s", n, m) as writer:
        for start in range(0, n, 10_000):
            writer.values[start : start + 10_000] = rng.standard_normal((10_000, m), np.float32)
        scores = writer.finish()
    import dattri_core.scores as module

    whole = n * m * 4
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "CHUNK", 2**19)
    tracemalloc.start()
    found = scores.top(3)
    one = scores.top(3, test=7)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    patch.undo()
    assert peak < whole / 8
    want = np.argsort(-np.asarray(scores.values), axis=0, kind="stable")[:3]
    assert np.array_equal(found.ids, want)
    assert list(one.ids) == want[:, 7].tolist()


PROGRAM = """
import sys
import torch
from pathlib import Path
from dattri_core.scores import Scores
import dattri_core.scores as module
module.CHUNK = 4 * 2**20
def resident(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
torch.randn(1000, 200).topk(3, dim=0)
Scores(torch.randn(1000, 200)).top(5)
scores = Scores.load(sys.argv[1], verify=False)
before = resident("VmRSS")
scores.top(5); scores.bottom(5, test=3); scores.mean_over_tests()
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_resident_memory_does_not_grow_with_the_matrix(tmp_path):
    n, m = 200_000, 200  # 160 MB
    with ScoresWriter(tmp_path / "s", n, m) as writer:
        block = torch.randn(1000, m, generator=torch.Generator().manual_seed(0)).numpy()
        for start in range(0, n, 1000):
            writer.values[start : start + 1000] = block
            writer.release()
        writer.finish()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "s")]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(answer.stdout) < n * m * 4 / 2
