"""The counterfactual store: hits, misses, resuming, and files that are not what they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import attrs
import numpy as np
import pytest
from dattri_retrain import CounterfactualStore
from dattri_retrain.shards import STALE
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import same, subsets
from toys import M, N, Toy

import dattri_core as dattri
from dattri_core import Counterfactual, InputError, NumericsError, Outcomes, SpecError, StoreError

HERE = Path(__file__).parent


def reference(tmp_path, plan, **changes):
    store = CounterfactualStore(tmp_path / "reference", Toy(**changes))
    store.fill(plan)
    return store.rows()


def shards(store):
    return sorted(store.path.glob("rows-*.npz"))


# --- hits and misses ------------------------------------------------------------------------------
def test_outcomes_are_those_of_the_retraining_and_are_trained_once(tmp_path):
    toy, plan = Toy(), subsets(7)
    store = CounterfactualStore(tmp_path, toy)
    assert isinstance(store, Outcomes)
    assert len(store) == 0
    assert store.missing(plan) == plan
    for target in toy.targets:
        assert np.array_equal(store.outcomes(plan, target), toy.expected(plan, target))
    assert toy.trained == 7
    assert (len(store), store.missing(plan)) == (7, [])
    again = Toy()
    later = CounterfactualStore(tmp_path, again)
    order = [plan[4], plan[0], plan[4]]
    assert np.array_equal(later.outcomes(order, "loss"), toy.expected(order, "loss"))
    assert (again.trained, later.fill(plan)) == (0, 0)


def test_what_is_asked_for_twice_is_trained_once_and_the_rest_is_added(tmp_path):
    toy, plan = Toy(), subsets(6)
    store = CounterfactualStore(tmp_path, toy)
    assert store.fill([plan[0], plan[0], plan[1]]) == 2
    assert store.fill(plan) == 4
    assert toy.trained == 6


def test_a_changed_recipe_seed_or_mask_is_a_miss_and_one_folder_serves_many(tmp_path):
    plan = subsets(4)
    CounterfactualStore(tmp_path, Toy()).fill(plan)
    changed = CounterfactualStore(tmp_path, Toy(steps=11))
    assert len(changed.missing(plan)) == 4
    changed.fill(plan)
    same_again = CounterfactualStore(tmp_path, Toy())
    assert same_again.missing(plan) == []
    other_seed = [attrs.evolve(c, seed=c.seed + 10) for c in plan]
    assert len(same_again.missing(other_seed)) == 4
    other_mask = [attrs.evolve(c, mask=~c.mask) for c in plan]
    assert len(same_again.missing(other_mask)) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [Toy().fingerprint, Toy(steps=11).fingerprint]
    )
    assert not np.array_equal(changed.outcomes(plan, "loss"), same_again.outcomes(plan, "loss"))


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=25),
    st.sampled_from([1, 3, 4]),
    st.integers(1, 4),
)
def test_rows_do_not_depend_on_how_they_were_asked_for(tmp_path_factory, chosen, together, cut):
    folder = tmp_path_factory.mktemp("store")
    plan = subsets(10)
    asked = [plan[i] for i in chosen]
    store = CounterfactualStore(folder, Toy(together=together))
    for start in range(0, len(asked), cut):
        store.fill(asked[start : start + cut])
    want = reference(folder, sorted(asked, key=lambda c: c.key))
    assert same(store.rows(), want)
    assert same(CounterfactualStore(folder, Toy()).rows(), want)


def test_rows_give_masks_and_seeds_back(tmp_path):
    plan = subsets(5, n=N)
    rows = reference(tmp_path, plan)
    wanted = {(c.seed, c.mask.tobytes()): k for k, c in enumerate(plan)}
    found = [
        wanted[int(seed), mask.tobytes()] for seed, mask in zip(rows.seeds, rows.masks, strict=True)
    ]
    assert sorted(found) == list(range(5))
    expected = Toy().expected([plan[k] for k in found], "margin")
    assert np.array_equal(rows.outcomes["margin"], expected)


# --- groups and parts -----------------------------------------------------------------------------
def test_models_are_trained_in_the_same_groups_whatever_is_there(tmp_path):
    plan = subsets(10)
    toy = Toy(together=4)
    store = CounterfactualStore(tmp_path, toy)
    store.fill(plan[4:8])
    store.fill(plan)
    keys = [c.key for c in plan]
    assert toy.calls == [tuple(keys[4:8]), tuple(keys[:4]), tuple(keys[8:])]


@pytest.mark.parametrize("together", [1, 3])
def test_parts_share_the_work_and_meet_all_of_it(tmp_path, together):
    plan, parts = subsets(11), []
    for part in range(1, 5):
        toy = Toy(together=together)
        CounterfactualStore(tmp_path, toy).fill(plan, index=(part, 4))
        parts.append({key for call in toy.calls for key in call})
    assert sum(map(len, parts)) == len(set.union(*parts)) == 11
    done = Toy()
    assert CounterfactualStore(tmp_path, done).fill(plan) == 0
    assert same(CounterfactualStore(tmp_path, done).rows(), reference(tmp_path, plan))
    for wrong in ((0, 4), (5, 4)):
        with pytest.raises(InputError, match="parts count from 1 to 4"):
            CounterfactualStore(tmp_path, done).fill(plan, index=wrong)


def test_shards_of_two_machines_are_joined_by_copying_them(tmp_path):
    plan = subsets(6)
    stores = [CounterfactualStore(tmp_path / name, Toy()) for name in "ab"]
    stores[0].fill(plan[:4])
    stores[1].fill(plan[2:])
    for path in shards(stores[1]):
        (stores[0].path / path.name).write_bytes(path.read_bytes())
    assert same(stores[0].rows(), reference(tmp_path, plan))


def test_another_process_may_fill_the_store_meanwhile(tmp_path):
    plan = subsets(6)
    other = CounterfactualStore(tmp_path, Toy())

    @attrs.frozen(eq=False)
    class Watching(Toy):
        def train(self, counterfactuals):
            if counterfactuals[0].key == plan[1].key:
                other.fill(plan[3:5])
            return super().train(counterfactuals)

    toy = Watching()
    store = CounterfactualStore(tmp_path, toy, every=0.0)
    store.fill(plan)
    assert toy.calls == [(plan[k].key,) for k in (0, 1, 2, 5)]
    assert same(store.rows(), reference(tmp_path, plan))


# --- stopped --------------------------------------------------------------------------------------
@pytest.mark.parametrize("after", [0, 1, 5])
def test_ctrl_c_keeps_every_model_that_was_measured(tmp_path, after):
    plan = subsets(8)
    with pytest.raises(KeyboardInterrupt):
        CounterfactualStore(tmp_path, Toy(together=3, stop_after=after)).fill(plan)
    toy = Toy(together=3)
    store = CounterfactualStore(tmp_path, toy)
    assert len(store) == after
    assert not list(store.path.glob(".*"))
    assert store.fill(plan) == 8 - after
    assert toy.trained == 8 - after
    assert same(store.rows(), reference(tmp_path, plan))


def test_a_diverged_training_is_named_and_the_others_are_kept(tmp_path):
    plan = subsets(5)
    store = CounterfactualStore(tmp_path, Toy(diverges=plan[3].key))
    with pytest.raises(NumericsError, match=rf"of {N} examples with seed 0 gives 'loss' = nan"):
        store.fill(plan)
    assert len(store) == 3


def test_killed_at_any_moment_and_run_again_the_rows_are_the_same(tmp_path):
    script = [sys.executable, str(HERE / "killed_fill.py"), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    one, groups = found["changes"]
    # the folder and the manifest are made, and a shard for each of 6 or 2 groups
    assert one["moments"] >= 15
    assert groups["moments"] >= 8
    assert [c["sound"] for c in found["changes"]] == [True, True]
    assert [c["equal"] for c in found["changes"]] == [True, True]
    assert found["again"] == [{"kills": 5, "equal": True}, {"kills": 1, "equal": True}]
    clock = found["clock"]
    assert (clock["kills"], clock["equal"]) == (2, True)
    assert 3 <= clock["kept"][0] < clock["kept"][1] < 30
    assert found["at once"] == {"status": [0, 0], "again": 0, "equal": True}


def test_unfinished_files_of_the_killed_are_removed_when_they_are_old(tmp_path):
    store = CounterfactualStore(tmp_path, Toy())
    store.fill(subsets(1))
    old, new = (store.path / f".rows-{c}.npz.partial-0123abcd" for c in "ab")
    for path in (old, new):
        path.write_bytes(b"half")
    past = time.time() - 2 * STALE
    os.utime(old, (past, past))
    store.fill(subsets(2))
    assert not old.exists()
    assert new.exists()


# --- refused --------------------------------------------------------------------------------------
def filled(tmp_path):
    store = CounterfactualStore(tmp_path, Toy(), every=0.0)
    store.fill(subsets(3))
    assert len(shards(store)) == 3
    return store


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_shard_is_named_and_deleting_it_mends_the_store(tmp_path, damage):
    store = filled(tmp_path)
    want, path = store.rows(), shards(store)[1]
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes({"truncated": data[:-7], "flipped": data, "empty": b""}[damage])
    fresh = CounterfactualStore(tmp_path, Toy())
    for act in (fresh.rows, lambda: fresh.fill(subsets(3)), lambda: fresh.missing(subsets(1))):
        with pytest.raises(StoreError, match=f"{path.name}.*truncated or damaged.*delete it"):
            act()
    path.unlink()
    mended = CounterfactualStore(tmp_path, Toy())
    assert mended.fill(subsets(3)) == 1
    assert same(mended.rows(), want)


def test_a_shard_of_another_retraining_is_refused(tmp_path):
    store = filled(tmp_path)
    foreign = CounterfactualStore(tmp_path, Toy(steps=3))
    foreign.fill(subsets(1))
    (path,) = shards(foreign)
    (store.path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(StoreError, match=f"{path.name}.*another retraining: fingerprint is"):
        CounterfactualStore(tmp_path, Toy()).rows()


def test_a_file_that_is_no_shard_is_refused(tmp_path):
    import hashlib

    store = filled(tmp_path)
    for data in (b"text", b"PK\x03\x04 no archive"):
        path = store.path / f"rows-{hashlib.sha256(data).hexdigest()[:32]}.npz"
        path.write_bytes(data)
        with pytest.raises(StoreError, match="is no shard of this store"):
            CounterfactualStore(tmp_path, Toy()).rows()
        path.unlink()


def test_a_pickle_in_a_shard_is_never_loaded(tmp_path):
    import hashlib
    import io

    store = filled(tmp_path)
    buffer = io.BytesIO()
    np.savez(buffer, about=np.array([{"a": 1}], dtype=object))
    data = buffer.getvalue()
    path = store.path / f"rows-{hashlib.sha256(data).hexdigest()[:32]}.npz"
    path.write_bytes(data)
    with pytest.raises(StoreError, match="allow_pickle"):
        CounterfactualStore(tmp_path, Toy()).rows()


def test_the_manifest_says_what_the_rows_are(tmp_path):
    store = filled(tmp_path)
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest["facts"] == {
        "fingerprint": Toy().fingerprint,
        "n_train": N,
        "n_test": M,
        "targets": {"loss": False, "margin": True},
    }
    assert {"torch", "numpy", "dattri-core", "python"} <= set(manifest["versions"])


def test_a_fingerprint_that_does_not_cover_the_data_is_refused(tmp_path):
    @attrs.frozen(eq=False)
    class Careless(Toy):
        fingerprint = "same"

    CounterfactualStore(tmp_path, Careless()).fill(subsets(1))
    with pytest.raises(StoreError, match="n_test is 5, this retraining's is 6"):
        CounterfactualStore(tmp_path, Careless(n_test=6))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "not the manifest"),
        ('{"format": "x", "version": 1, "facts": {}}', "not the manifest"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path, text, message):
    store = filled(tmp_path)
    (store.path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=message):
        CounterfactualStore(tmp_path, Toy())


def test_bad_input_is_refused_before_anything_is_trained(tmp_path):
    toy = Toy()
    store = CounterfactualStore(tmp_path, toy)
    with pytest.raises(InputError, match="counterfactual 1 has 7 entries, and there are 12"):
        store.fill([*subsets(1), Counterfactual(np.ones(7, bool))])
    with pytest.raises(SpecError, match="did you mean 'margin'"):
        store.outcomes(subsets(1), "margins")
    with pytest.raises(InputError, match="expected a Retraining"):
        CounterfactualStore(tmp_path, object())
    for bad in ("", "../up", "a/b", "x" * 200):
        with pytest.raises(InputError, match="cannot name a folder"):
            CounterfactualStore(tmp_path, Named(fingerprint=bad))
    assert toy.trained == 0
    assert list(tmp_path.iterdir()) == []


@attrs.frozen(eq=False)
class Named(Toy):
    fingerprint: str = attrs.field(default="", kw_only=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": lambda self, c: iter([{}] * (len(c) - 1))}, "fewer models than the 2"),
        ({"train": lambda self, c: iter([{}] * (len(c) + 1))}, "more models than the 2"),
        ({"measure": lambda self, s: {"loss": np.zeros(M)}}, "no 'margin'"),
        ({"measure": lambda self, s: {"loss": np.zeros(3), "margin": np.zeros(M)}}, r"\(3,\)"),
    ],
)
def test_a_retraining_that_breaks_its_promise_is_named(tmp_path, change, message):
    cls = type("Broken", (Toy,), {"train": _zeros, "measure": _constant, **change})
    with pytest.raises(InputError, match=message):
        CounterfactualStore(tmp_path, cls(together=2)).fill(subsets(2))


def _zeros(self, counterfactuals):
    return iter([{}] * len(counterfactuals))


def _constant(self, state):
    return {"loss": np.zeros(M), "margin": np.zeros(M)}


def test_the_ground_truth_is_registered():
    made = dattri.default_registry().resolve("ground_truth", "retraining")
    assert made is CounterfactualStore


def test_a_shard_that_is_full_is_written_before_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr("dattri_retrain.work.SHARD_BYTES", 200)
    store = CounterfactualStore(tmp_path, Toy(together=7))
    store.fill(subsets(7))
    assert len(shards(store)) == 4
    monkeypatch.setattr("dattri_retrain.index.HELD", 100)
    assert same(CounterfactualStore(tmp_path, Toy()).rows(), store.rows())
