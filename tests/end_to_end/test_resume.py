"""Scores on disk: the same bits as in memory, however often the run is stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from oracles.toy_parts import Gram, inverse
from oracles.toy_tasks import examples, mlp, states

import dattri_core as dattri
from dattri_core import Method, Scores, StoreError, Task
from dattri_core import run_plan as engine

HERE = Path(__file__).parent
N, M = 14, 5
TRAIN, TEST = examples(N), examples(M, seed=300)
RATES = [0.5, 0.25]
METHODS = ["grad-dot", "grad-cos", "tracin", "if-explicit", "if-cg"]
METHODS.append(pytest.param(dattri.method("trak", dim=9), id="trak"))


def task(weights=None, **options):
    return Task(mlp(), checkpoints=weights or states(2), learning_rates=RATES, **options)


def cut_small(monkeypatch):
    """Cut the work into 2 query groups and 3 shards."""
    original = engine.make_plan

    def plan(*arguments, **named):
        made = original(*arguments, **named)
        return attrs.evolve(made, train_batch=3, test_batch=2, query_group=3, groups=2, shard=6)

    monkeypatch.setattr(engine, "make_plan", plan)


@pytest.fixture
def small(monkeypatch):
    cut_small(monkeypatch)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_scores_on_disk_equal_scores_in_memory_bit_for_bit(method, tmp_path, small):
    kept = dattri.attribute(task(), TRAIN, TEST, method=method)
    written = dattri.attribute(task(), TRAIN, TEST, method=method, out=tmp_path / "scores")
    assert isinstance(written.values, np.memmap)
    assert np.array_equal(written.values, kept.values.numpy())
    loaded = Scores.load(tmp_path / "scores")
    assert np.array_equal(np.asarray(loaded.values), kept.values.numpy())
    assert loaded.provenance == kept.provenance == written.provenance
    assert names(tmp_path) == ["scores"]


# --- stopped by an exception ----------------------------------------------------------------------
class Stop:
    """Raises at the n-th call of a function of the engine."""

    def __init__(self, monkeypatch, target, at, error=KeyboardInterrupt):
        import importlib

        module, _, attribute = target.rpartition(".")
        owner = importlib.import_module(module) if "." in module else None
        original = getattr(owner, attribute)
        self.calls = 0

        def wrapped(*arguments, **named):
            self.calls += 1
            if self.calls == at:
                raise error
            return original(*arguments, **named)

        monkeypatch.setattr(owner, attribute, wrapped)


MOMENTS = [
    ("dattri_core.snapshot.fit_checkpoint", 1),
    ("dattri_core.loop.score_tile", 1),
    ("dattri_core.loop.score_tile", 5),
    ("dattri_core.loop.score_tile", 12),
    ("dattri_core.tiles.save", 1),
    ("dattri_core.tiles.save", 7),
    ("dattri_core.runner.ScoresWriter", 1),
    ("dattri_core.scores_file.write_text", 1),
]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(("where", "at"), MOMENTS)
def test_a_run_that_is_stopped_leaves_no_half_written_file_and_goes_on(
    where, at, error, tmp_path, small
):
    with pytest.MonkeyPatch.context() as patch:
        # The engine calls its functions by the names of the modules that import them.
        target = where.replace("snapshot.fit_checkpoint", "fitted.fit_checkpoint")
        stop = Stop(patch, target, at, error)
        with pytest.raises(error):
            dattri.attribute(task(), TRAIN, TEST, method="tracin", out=tmp_path / "scores")
        assert stop.calls == at
    left = [path.name for path in tmp_path.rglob("*")]
    assert not any("partial" in name for name in left)
    assert "scores" not in left
    if (tmp_path / "scores.run").exists():
        tiles = [name for name in left if name.endswith("safetensors")]
        assert len(tiles) <= 6  # 2 groups of 3 shards; a state replaces the one before
    with pytest.MonkeyPatch.context() as patch:
        scored = Stop(patch, "dattri_core.loop.score_tile", -1)
        again = dattri.attribute(task(), TRAIN, TEST, method="tracin", out=tmp_path / "scores")
    if "score_tile" in where:
        assert scored.calls == 12 - (at - 1)  # no tile is computed twice
    want = dattri.attribute(task(), TRAIN, TEST, method="tracin")
    assert np.array_equal(again.values, want.values.numpy())
    assert names(tmp_path) == ["scores"]


@pytest.mark.parametrize("at", [1, 6, 7, 10, 12])
def test_a_fold_of_two_means_goes_on_within_and_between_checkpoints(at, tmp_path, small):
    method = dattri.method("trak", dim=9)
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, "dattri_core.loop.score_tile", at)
        with pytest.raises(KeyboardInterrupt):
            method.attribute(task(), TRAIN, TEST, out=tmp_path / "scores")
    again = method.attribute(task(), TRAIN, TEST, out=tmp_path / "scores")
    want = method.attribute(task(), TRAIN, TEST)
    assert np.array_equal(again.values, want.values.numpy())
    assert again.provenance["target"]["name"] == "margin"


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_with_the_sizes_it_began_with(method, tmp_path):
    """Another amount of free memory cuts sums at other places; a resumed run must not notice."""
    train, test = examples(200, dtype=torch.float32), examples(40, seed=300, dtype=torch.float32)

    def run(memory, out=None):
        weights = states(2, dtype=torch.float32)
        made = Task(mlp(dtype=torch.float32), checkpoints=weights, learning_rates=RATES)
        return dattri.attribute(made, train, test, method=method, memory=memory, out=out).values

    want = run("1MiB").numpy()
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, "dattri_core.loop.score_tile", 2)
        with pytest.raises(KeyboardInterrupt):
            run("1MiB", tmp_path / "scores")
    assert np.array_equal(run("1GiB", tmp_path / "scores"), want)


def test_a_fitted_method_goes_on_with_the_sizes_of_the_run(tmp_path):
    method = dattri.method("grad-cos")

    def run(name):
        return method.fit(task(), TRAIN, memory="1MiB").attribute(TEST, out=tmp_path / name)

    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch)
        want = run("whole").values
        Stop(patch, "dattri_core.loop.score_tile", 4)
        with pytest.raises(KeyboardInterrupt):
            run("scores")
    with pytest.MonkeyPatch.context() as patch:
        scored = Stop(patch, "dattri_core.loop.score_tile", -1)
        assert np.array_equal(run("scores").values, want)
    assert scored.calls == 9


def test_every_checkpoint_is_fitted_once(tmp_path, small):
    gram = Gram()
    method = Method(inverse_hessian=inverse(gram))
    method.attribute(task(), TRAIN, TEST, out=tmp_path / "scores")
    assert gram.counts["fit"] == 2


# --- stale and foreign folders --------------------------------------------------------------------
def stopped(folder, method="tracin"):
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, "dattri_core.loop.score_tile", 8)
        with pytest.raises(KeyboardInterrupt):
            dattri.attribute(task(), TRAIN, TEST, method=method, out=folder)


def other_weights():
    weights = states(2)
    weights[1]["0.bias"][2] += 1e-12
    return weights


def other(batch):
    changed = batch[0].clone()
    changed[3, 1] += 1e-12
    return changed, batch[1]


STALE = {
    "method": lambda: (task(), TRAIN, TEST, "grad-cos"),
    "weights": lambda: (task(other_weights()), TRAIN, TEST, "tracin"),
    "train": lambda: (task(), other(TRAIN), TEST, "tracin"),
    "test": lambda: (task(), TRAIN, other(TEST), "tracin"),
    "parameters": lambda: (task(parameters="2.*"), TRAIN, TEST, "tracin"),
    "target": lambda: (task(target="margin"), TRAIN, TEST, "tracin"),
    "learning_rates": lambda: (
        Task(mlp(), checkpoints=states(2), learning_rates=[1.0, 1.0]),
        TRAIN,
        TEST,
        "tracin",
    ),
    "loss": lambda: (
        task(
            loss=dattri.Loss(dattri.cross_entropy.forward, dattri.cross_entropy.criterion, "mine")
        ),
        TRAIN,
        TEST,
        "tracin",
    ),
    "n_train": lambda: (task(), tuple(t[:-1] for t in TRAIN), TEST, "tracin"),
}


@pytest.mark.parametrize("fact", STALE)
def test_an_unfinished_run_of_something_else_is_refused_and_named(fact, tmp_path, small):
    stopped(tmp_path / "scores")
    before = {path: path.read_bytes() for path in (tmp_path / "scores.run").iterdir()}
    made, train, test, method = STALE[fact]()
    with pytest.raises(
        StoreError, match=rf"unfinished run with .*another {fact}.*{fact}: .*delete"
    ):
        dattri.attribute(made, train, test, method=method, out=tmp_path / "scores")
    assert {path: path.read_bytes() for path in (tmp_path / "scores.run").iterdir()} == before
    dattri.attribute(task(), TRAIN, TEST, method="tracin", out=tmp_path / "scores")


def test_a_truncated_tile_is_refused_and_computed_anew_when_it_is_deleted(tmp_path, small):
    stopped(tmp_path / "scores")
    tile = sorted((tmp_path / "scores.run").glob("*.safetensors"))[2]
    tile.write_bytes(tile.read_bytes()[:-8])
    with pytest.raises(StoreError, match=rf"{tile.name}.*delete this file"):
        dattri.attribute(task(), TRAIN, TEST, method="tracin", out=tmp_path / "scores")
    tile.unlink()
    got = dattri.attribute(task(), TRAIN, TEST, method="tracin", out=tmp_path / "scores")
    want = dattri.attribute(task(), TRAIN, TEST, method="tracin")
    assert np.array_equal(got.values, want.values.numpy())


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_folder_of_something_else_is_refused_before_any_work(what, tmp_path):
    gram = Gram()
    out = tmp_path / "scores"
    if what == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    else:
        out.write_text("mine")
    method = Method(inverse_hessian=inverse(gram))
    with pytest.raises(StoreError, match=r"it exists and holds other files|a file has this name"):
        method.attribute(task(), TRAIN, TEST, out=out)
    assert gram.counts["fit"] == 0
    assert names(tmp_path) == ["scores"]


def test_finished_scores_of_another_call_are_replaced_as_a_whole_and_that_is_said(tmp_path):
    out = tmp_path / "scores"
    dattri.attribute(task(), TRAIN, TEST, method="tracin", out=out)
    with pytest.warns(UserWarning, match="with another test; they are replaced"):
        changed = dattri.attribute(task(), TRAIN, other(TEST), method="tracin", out=out)
    with pytest.warns(UserWarning, match="with another method and another test"):
        dattri.attribute(task(), TRAIN, TEST, method="grad-dot", out=out)
    assert changed.provenance["test"] != Scores.load(out).provenance["test"]
    want = dattri.attribute(task(), TRAIN, TEST, method="grad-dot")
    assert np.array_equal(np.asarray(Scores.load(out).values), want.values.numpy())
    assert names(tmp_path) == ["scores"]


def test_finished_scores_of_the_same_call_are_returned_and_that_is_said(tmp_path, monkeypatch):
    out = tmp_path / "scores"
    first = dattri.attribute(task(), TRAIN, TEST, method="tracin", out=out)
    scored = Stop(monkeypatch, "dattri_core.loop.score_tile", -1)
    with pytest.warns(UserWarning, match=r"finished scores of this very call, which are returned"):
        again = dattri.attribute(task(), TRAIN, TEST, method="tracin", out=out)
    assert scored.calls == 0
    assert np.array_equal(again.values, first.values)
    assert (again.provenance, again.train_ids) == (first.provenance, first.train_ids)
    values = bytearray((out / "values.npy").read_bytes())
    values[-1] ^= 1
    (out / "values.npy").write_bytes(values)
    mended = dattri.attribute(task(), TRAIN, TEST, method="tracin", out=out)
    assert scored.calls > 0
    assert np.array_equal(mended.values, dattri.attribute(task(), TRAIN, TEST, "tracin").values)


@pytest.mark.parametrize("method", ["if-ekfac", "if-cg", "logra"])
def test_finished_scores_are_returned_without_a_fit(method, tmp_path, monkeypatch):
    out, options = tmp_path / "scores", {"method": method, "progress": False}
    first = dattri.attribute(task(), TRAIN, TEST, out=out, **options)
    read = []
    batches = dattri.Examples.batches

    def counted(self, *arguments, **named):
        for positions, batch in batches(self, *arguments, **named):
            read.append(len(positions))
            yield positions, batch

    monkeypatch.setattr(dattri.Examples, "batches", counted)
    with pytest.warns(UserWarning, match="finished scores of this very call"):
        again = dattri.attribute(task(), TRAIN, TEST, out=out, **options)
    assert sum(read) < len(TRAIN[0])  # the few that every call looks at
    assert np.array_equal(again.values, first.values)
    assert again.provenance == first.provenance
    with pytest.warns(UserWarning, match="with another method; they are replaced") as told:
        dattri.attribute(task(), TRAIN, TEST, method="grad-cos", out=out)
    assert len([w for w in told if "are replaced" in str(w.message)]) == 1
    assert sum(read) >= len(TRAIN[0])


def test_finished_scores_are_returned_where_nothing_can_be_written(tmp_path, monkeypatch):
    """A folder of results that others may read only has room for no lock."""
    out = tmp_path / "scores"
    first = dattri.attribute(task(), TRAIN, TEST, method="tracin", out=out)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    original = Path.open

    def refused(path, *arguments, **named):
        if path.name.endswith(".lock"):
            raise PermissionError(13, "Permission denied")
        return original(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.warns(UserWarning, match="finished scores of this very call"):
        again = dattri.attribute(task(), TRAIN, TEST, method="tracin", out=out)
    assert np.array_equal(again.values, first.values)
    with (
        pytest.warns(UserWarning, match="finished scores with another method"),
        pytest.raises(StoreError, match=r"lock .* cannot be written \(Permission denied\)"),
    ):
        dattri.attribute(task(), TRAIN, TEST, method="grad-dot", out=out)


class Read(torch.utils.data.Dataset):
    """Examples that are read one at a time; one may be another."""

    def __init__(self, n, seed=0, changed=None):
        self.inputs, self.labels = examples(n, seed=seed)
        if changed is not None:
            self.inputs[changed] += 1e-6

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        return self.inputs[i], self.labels[i]


@pytest.mark.parametrize("fact", ["train", "test", "reference"])
def test_one_example_changed_among_many_is_seen_by_a_resumed_run(fact, tmp_path):
    def run(**changed):
        data = {
            name: Read(130, changed=changed.get(name)) for name in ("train", "test", "reference")
        }
        method = dattri.method("grad-dot")
        made = task(reference=data["reference"])
        return method.attribute(made, data["train"], data["test"], out=tmp_path / "scores")

    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, "dattri_core.loop.score_tile", 2)
        with pytest.raises(KeyboardInterrupt):
            run()
    with pytest.raises(StoreError, match=rf"unfinished run with another {fact} "):
        run(**{fact: 66})
    run()


@pytest.mark.parametrize("errno", [28, 30], ids=["full", "read-only"])
def test_a_disk_that_does_not_take_the_tiles_is_a_store_error(errno, tmp_path, monkeypatch, small):
    def refuse(*_):
        raise OSError(errno, os.strerror(errno))

    with monkeypatch.context() as patch:
        Stop(patch, "dattri_core.tiles.save", 3, OSError(errno, os.strerror(errno)))
        with pytest.raises(
            StoreError, match=rf"the tile: cannot be written \({os.strerror(errno)}"
        ):
            dattri.attribute(task(), TRAIN, TEST, method="tracin", out=tmp_path / "scores")
    got = dattri.attribute(task(), TRAIN, TEST, method="tracin", out=tmp_path / "scores")
    want = dattri.attribute(task(), TRAIN, TEST, method="tracin")
    assert np.array_equal(got.values, want.values.numpy())
    monkeypatch.setattr("dattri_core.atomic.os.fsync", refuse)
    with pytest.raises(StoreError, match=r"run folder .*cannot be written"):
        dattri.attribute(task(), TRAIN, TEST, method="grad-cos", out=tmp_path / "other")


def test_scores_that_the_disk_has_no_room_for_are_refused_before_any_is_computed(
    tmp_path, monkeypatch, small
):
    size = 8 * N * M
    scored = Stop(monkeypatch, "dattri_core.loop.score_tile", -1)
    free = {"bytes": 2 * size - 1}
    usage = type("Usage", (), {"free": property(lambda _: free["bytes"])})
    monkeypatch.setattr("dattri_core.atomic.shutil.disk_usage", lambda _: usage())
    with pytest.raises(StoreError, match=rf"{N} x {M} numbers.*take 1.1 KiB, and 1.1 KiB are free"):
        dattri.attribute(task(), TRAIN, TEST, method="grad-cos", out=tmp_path / "new" / "scores")
    assert scored.calls == 0
    free["bytes"] += 1
    dattri.attribute(task(), TRAIN, TEST, method="grad-cos", out=tmp_path / "new" / "scores")


SLOW = (pytest.mark.slow, pytest.mark.timeout(0))


# --- killed -------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
@pytest.mark.parametrize(
    ("method", "stride"),
    [
        ("tracin", 11),
        pytest.param("tracin", 1, marks=SLOW),
        pytest.param("if-cg", 1, marks=SLOW),
    ],
)
def test_a_run_that_is_killed_at_any_moment_gives_the_same_bits(method, stride, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_run.py"), str(tmp_path), method, str(stride)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280 if stride > 1 else 3600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["nonzero"]
    assert report["sweep"]["moments"] > 60 // stride
    assert report["sweep"]["different"] == 0
    assert report["sweep"]["left"] == 0  # beside the scores
    assert report["again"]["kills"] >= 2
    assert not report["again"]["different"]
    assert report["clock"]["different"] == 0
