"""The gradient store: the same scores, no train example evaluated twice, no foreign rows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch
from oracles.toy_tasks import examples, mlp, states
from torch import nn

import dattri_core as dattri
from dattri_core import NumericsError, SpecError, Store, StoreError, Task, cli, stored
from dattri_core.evaluate import Evaluator
from dattri_core.snapshot import LOOK
from dattri_core.stream import Examples

HERE = Path(__file__).parent
N, M = 14, 5
TRAIN, TEST = examples(N), examples(M, seed=300)
METHODS = {
    "grad-dot": {},
    "grad-cos": {},
    "if-woodbury": {"curvature": "gauss-newton", "damping": 1e-2},
    "logra": {"rank": 3, "damping": 1e-2},
    "if-explicit": {"curvature": "ggn", "damping": 1e-2},
    "if-datainf": {"damping": 1e-2},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Cut the rows of a checkpoint into shards of 6, computed 3 at a time."""
    original = stored.plan_layout
    monkeypatch.setattr(
        stored, "plan_layout", lambda *a: attrs.evolve(original(*a), batch=3, shard=6)
    )


@pytest.fixture
def passes(monkeypatch):
    """Count the train examples, without those of the sample, that are differentiated."""
    seen = []
    apart = torch.ones(N, dtype=torch.bool)
    apart[Examples.of(TRAIN, "train").sampled(LOOK)[0]] = False
    original = Evaluator.total_of

    def total_of(self, model, batch, role, *rest):
        rows = batch[0].detach()[:, None] == TRAIN[0][apart]
        seen.append(int(rows.all(-1).sum()))
        return original(self, model, batch, role, *rest)

    monkeypatch.setattr(Evaluator, "total_of", total_of)
    return seen


def task(weights=None, **options):
    return Task(mlp(), checkpoints=weights or states(2), **options)


def close(got, want):
    torch.testing.assert_close(got.values, want.values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_scores_through_a_store_are_the_scores(name, tmp_path):
    method = dattri.method(name, **METHODS[name])
    want = method.attribute(task(), TRAIN, TEST)
    for _ in range(2):  # computed, then read
        close(method.attribute(task(), TRAIN, TEST, store=tmp_path / "rows"), want)
    own = method.fit(task(), TRAIN).self_influence()
    got = method.fit(task(), TRAIN, store=tmp_path / "rows").self_influence()
    torch.testing.assert_close(got, own, rtol=1e-10, atol=1e-12)


def test_a_second_test_set_evaluates_no_train_example(tmp_path, passes):
    method = dattri.method("logra", rank=3, damping=1e-2)
    method.attribute(task(), TRAIN, TEST, store=tmp_path / "rows")
    assert sum(passes) == 2 * (N - LOOK)  # once at each checkpoint; the sample is also checked
    passes.clear()
    again = method.attribute(task(), TRAIN, examples(M, seed=400), store=tmp_path / "rows")
    assert len(passes) > 0
    assert sum(passes) == 0
    close(again, method.attribute(task(), TRAIN, examples(M, seed=400)))


def test_other_scorers_curvatures_and_dampings_read_the_same_rows(tmp_path, passes):
    base = dattri.method("logra", rank=3, damping=1e-2)
    base.attribute(task(), TRAIN, TEST, store=tmp_path / "rows")
    for changes in ({"scorer": "cosine"}, {"damping": 1.0}, {"scorer": "relatif"}):
        method = dattri.method("logra", **{"rank": 3, "damping": 1e-2, **changes})
        passes.clear()
        got = method.attribute(task(), TRAIN, TEST, store=tmp_path / "rows")
        assert sum(passes) == 0
        close(got, method.attribute(task(), TRAIN, TEST))
    fitted = base.fit(task(states(1)), TRAIN, store=tmp_path / "one")
    passes.clear()
    swept = fitted.sweep(TEST, damping=[1e-2, 1.0])
    assert sum(passes) == 0
    close(swept[1.0], base.fit(task(states(1)), TRAIN).with_(damping=1.0).attribute(TEST))


def test_a_checkpoint_is_added_without_computing_those_before_it(tmp_path, passes):
    method = dattri.method("logra", rank=3, damping=1e-2)
    method.attribute(task(states(2)), TRAIN, TEST, store=tmp_path / "rows")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").rglob("*") if p.is_file()}
    got = method.attribute(task(states(3)), TRAIN, TEST, store=tmp_path / "rows")
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert len(list((tmp_path / "rows").glob("c*"))) == 3
    close(got, method.attribute(task(states(3)), TRAIN, TEST))


def test_a_build_that_is_stopped_goes_on_at_the_shard(tmp_path, monkeypatch):
    method = dattri.method("logra", rank=3, damping=1e-2)
    want = method.attribute(task(), TRAIN, TEST, store=tmp_path / "whole")
    original, written = stored.StoredCheckpoint.write, []

    def write(self, start, values, aux):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(start)
        original(self, start, values, aux)

    with monkeypatch.context() as patch:
        patch.setattr(stored.StoredCheckpoint, "write", write)
        with pytest.raises(KeyboardInterrupt):
            method.attribute(task(), TRAIN, TEST, store=tmp_path / "rows")
    plan = method.attribute(task(), TRAIN, TEST, store=tmp_path / "rows", dry_run=True)
    assert "2 of 3 shards there" in str(plan)
    got = method.attribute(task(), TRAIN, TEST, store=tmp_path / "rows")
    assert torch.equal(got.values, want.values)


def test_ids_and_loaders_survive(tmp_path):
    data = torch.utils.data.TensorDataset(*TRAIN)
    loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=[3, 1, 7, 0, 9])
    method = dattri.method("logra", rank=3, damping=1e-2)
    got = method.attribute(task(), loader, TEST, store=tmp_path / "rows")
    want = method.attribute(task(), loader, TEST)
    assert list(got.train_ids) == list(want.train_ids) == [3, 1, 7, 0, 9]
    close(got, want)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_dtype_on_disk_rounds_and_no_more(dtype, tmp_path):
    method = dattri.method("grad-dot")
    store = Store(tmp_path / "rows", dtype=dtype)
    got = method.attribute(task(), TRAIN, TEST, store=store)
    want = method.attribute(task(), TRAIN, TEST)
    unit = torch.finfo(getattr(torch, dtype)).eps
    gap = float((got.values - want.values).abs().max())
    assert gap <= 40 * unit * float(want.values.abs().max())
    if dtype != "float64":
        assert gap > 0
    with pytest.raises(StoreError, match="numbers are"):
        method.attribute(task(), TRAIN, TEST, store=Store(tmp_path / "rows", dtype=_other(dtype)))


def _other(dtype):
    return "float32" if dtype != "float32" else "float16"


def test_numbers_that_half_precision_does_not_hold_are_refused(tmp_path):
    def loss(model, batch):
        return 1e6 * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(NumericsError, match=r"not finite in float16.*bfloat16"):
        dattri.method("grad-dot").attribute(
            task(loss=loss), TRAIN, TEST, store=Store(tmp_path / "rows", dtype="float16")
        )


# --- what is refused -----------------------------------------------------------------------------
def changed_sample():
    inputs = TRAIN[0].clone()
    inputs[7, 2] += 1e-6
    return inputs, TRAIN[1]


def changed_weight():
    weights = states(2)
    weights[1]["0.weight"][0, 0] += 1e-9
    return weights


def named(name, factor=1):
    """Return a loss of some name; its fingerprint does not see its code."""

    def loss(model, batch):
        return factor * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    loss.__name__ = name
    return loss


OWN = named("own")
FOREIGN = {
    "a sample": ({}, changed_sample, {}, "another train"),
    "a weight": ({"weights": changed_weight}, None, {}, "checkpoint 1.*other weights"),
    "a rank": ({}, None, {"rank": 2}, "another projectors.*rank"),
    "a distribution": ({}, None, {"distribution": "normal"}, "another projectors.*distribution"),
    "the seed": ({}, None, {"seed": 1}, "another seed"),
    "the source": ({}, None, {"source": "functional"}, "another source"),
    "the parameters": ({"parameters": "2.*"}, None, {}, "another parameters"),
    "the loss": ({"loss": named("other")}, None, {}, "another loss"),
    "the code of the loss": ({"loss": named("own", 2)}, None, {}, "a few examples.*differ"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_rows_of_another_run_are_refused_by_name(what, tmp_path):
    options, train, changes, message = FOREIGN[what]
    base = {"rank": 3, "damping": 1e-2}
    dattri.method("logra", **base).attribute(task(loss=OWN), TRAIN, TEST, store=tmp_path / "rows")
    given = {"loss": OWN, **options}
    weights = given.pop("weights", lambda: None)()
    with pytest.raises(StoreError, match=message):
        dattri.method("logra", **{**base, **changes}).attribute(
            task(weights, **given), train() if train else TRAIN, TEST, store=tmp_path / "rows"
        )


class Read(torch.utils.data.Dataset):
    """Examples that are read one at a time; one label may be another."""

    def __init__(self, n=130, changed=None):
        self.inputs, self.labels = examples(n)
        self.reads = 0
        if changed is not None:
            self.labels[changed] = (self.labels[changed] + 1) % 3

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        self.reads += 1
        return self.inputs[i], self.labels[i]


LOGRA = {"rank": 3, "damping": 1e-2}


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: torch.utils.data.DataLoader(d, 16)])
def test_one_example_changed_among_many_is_seen(wrap, tmp_path):
    method = dattri.method("logra", **LOGRA)
    method.attribute(task(), wrap(Read()), TEST, store=tmp_path / "rows")
    with pytest.raises(StoreError, match="another train set"):
        method.attribute(task(), wrap(Read(changed=66)), TEST, store=tmp_path / "rows")
    got = method.attribute(task(), wrap(Read()), TEST, store=tmp_path / "rows")
    close(got, method.attribute(task(), wrap(Read()), TEST))


def test_a_store_that_compares_a_sample_reads_no_more_than_that(tmp_path):
    method = dattri.method("logra", **LOGRA)
    store = Store(tmp_path / "rows", check="sample")
    method.attribute(task(), Read(), TEST, store=store)
    data = Read()
    method.attribute(task(), data, TEST, store=store)
    sampled = data.reads
    with pytest.raises(StoreError, match="another train "):
        method.attribute(task(), Read(n=129), TEST, store=store)
    with pytest.raises(StoreError, match=r"without a hash of all.*check='sample'"):
        method.attribute(task(), Read(), TEST, store=tmp_path / "rows")
    whole = tmp_path / "whole"
    method.attribute(task(), Read(), TEST, store=whole)
    data = Read()
    method.attribute(task(), data, TEST, store=whole)
    assert data.reads == sampled + 130 + 1  # one pass, and one example that its pieces are cut by
    method.attribute(task(), Read(changed=66), TEST, store=Store(whole, check="sample"))
    with pytest.raises(ValueError, match="check"):
        Store(whole, check="none")


def test_a_disk_that_does_not_take_the_rows_is_a_store_error(tmp_path, monkeypatch):
    original, calls = os.fsync, []

    def full(last):
        def fsync(handle):
            calls.append(handle)
            if len(calls) == last:
                raise OSError(28, "No space left on device")
            original(handle)

        return fsync

    for at, what in ((1, "store"), (2, "store"), (4, "rows-000000006.safetensors")):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr("dattri_core.atomic.os.fsync", full(at))
            with pytest.raises(StoreError, match=rf"{what}.* cannot be written \(No space left"):
                dattri.method("grad-dot").attribute(task(), TRAIN, TEST, store=tmp_path / what)


def damage(root, how):
    first, second = sorted((root / "c00000").glob("rows-*"))[:2]
    if how == "corrupt":
        data = bytearray(first.read_bytes())
        data[-5] ^= 1
        first.write_bytes(bytes(data))
    elif how == "truncate":
        first.write_bytes(first.read_bytes()[:-7])
    elif how == "swap":
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)
    elif how == "of the other checkpoint":
        shutil.copy(root / "c00001" / first.name, first)
    elif how == "no shard at all":
        first.write_bytes(b"")
    return first


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("corrupt", "not those that were written"),
        ("truncate", "cannot be read"),
        ("swap", "holds the rows from 6, not from 0"),
        ("of the other checkpoint", "another checkpoint or another store"),
        ("no shard at all", "cannot be read"),
    ],
)
def test_a_damaged_shard_is_refused_by_name_and_mended_by_deleting_it(
    how, message, tmp_path, capsys
):
    method = dattri.method("logra", rank=3, damping=1e-2)
    want = method.attribute(task(), TRAIN, TEST, store=tmp_path / "rows")
    assert cli.main(["store", "verify", str(tmp_path / "rows")]) == 0
    bad = damage(tmp_path / "rows", how)
    with pytest.raises(StoreError, match=message) as raised:
        method.attribute(task(), TRAIN, TEST, store=tmp_path / "rows")
    assert bad.name in str(raised.value)
    capsys.readouterr()
    assert cli.main(["store", "verify", str(tmp_path / "rows")]) == 1
    assert bad.name in capsys.readouterr().out
    for shard in bad.parent.glob("rows-*"):
        shard.unlink()
    got = method.attribute(task(), TRAIN, TEST, store=tmp_path / "rows")
    assert torch.equal(got.values, want.values)


@pytest.mark.parametrize("text", ["", "{", '{"format": "other"}', "[1]"])
def test_a_damaged_manifest_is_refused(text, tmp_path):
    method = dattri.method("grad-dot")
    method.attribute(task(), TRAIN, TEST, store=tmp_path / "rows")
    (tmp_path / "rows" / "store.json").write_text(text)
    with pytest.raises(StoreError, match=r"store\.json is missing, truncated or foreign"):
        method.attribute(task(), TRAIN, TEST, store=tmp_path / "rows")
    assert cli.main(["store", "inspect", str(tmp_path / "rows")]) == 2


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(StoreError, match="not empty"):
        dattri.method("grad-dot").attribute(task(), TRAIN, TEST, store=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "dear"


def test_a_projector_that_needs_data_is_refused(tmp_path):
    method = dattri.method("logra", rank=3, initialisation="pca")
    with pytest.raises(SpecError, match="need no data"):
        method.attribute(task(), TRAIN, TEST, store=tmp_path / "rows")


def test_parts_that_need_factors_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"keep the factors.*leave store= out"):
        dattri.method("if-kfac").attribute(task(), TRAIN, TEST, store=tmp_path / "rows")


def test_inspect_says_what_a_store_holds(tmp_path, capsys):
    dattri.method("logra", rank=3).attribute(task(), TRAIN, TEST, store=tmp_path / "rows")
    capsys.readouterr()
    assert cli.main(["store", "inspect", str(tmp_path / "rows")]) == 0
    said = capsys.readouterr().out
    assert f"{N} of 18 numbers, float64" in said
    assert "kronecker" in said
    assert said.count("3/3") == 2


# --- killed --------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_a_build_that_is_killed_at_any_moment_gives_the_same_bits(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_store.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["files"] == 1 + 2 * (1 + 5)
    assert report["changes"]["moments"] > 20
    assert report["changes"]["different"] == 0
    assert report["random"]["kills"] == 20
    assert report["random"]["partial"] >= 5
    assert report["random"]["different"] == 0
