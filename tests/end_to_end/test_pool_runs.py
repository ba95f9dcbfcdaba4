"""`FittedMethod.over` on disk, with stores and kept fits, and what it refuses."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from oracles.pools import POOLS, TEST, TRAIN, N, dense_scores, method, task
from oracles.toy_tasks import examples
from torch import nn
from torch.utils.data import DataLoader

import dattri_core as dattri
from dattri_core import InputError, NumericsError, SpecError, StoreError, Task, TermScorer
from dattri_core import run_plan as engine

POOL = POOLS["more"]


def fit(name="if-ekfac", checkpoints=1, train=TRAIN, **options):
    return method(name).fit(task(checkpoints), train, progress=False, **options)


# --- on disk ------------------------------------------------------------------------------------
@pytest.fixture
def small(monkeypatch):
    """Cut the work into shards of seven rows."""
    original = engine.make_plan

    def plan(*arguments, **named):
        return attrs.evolve(original(*arguments, **named), shard=7, train_batch=7)

    monkeypatch.setattr(engine, "make_plan", plan)


def stop(monkeypatch, at):
    """Interrupt the run before a tile, counted from 1."""
    from dattri_core import loop

    original, calls = loop.score_tile, []

    def stopped(*arguments, **named):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(loop, "score_tile", stopped)
    return calls


@pytest.mark.parametrize("checkpoints", [1, 2])
@pytest.mark.parametrize("name", ["if-ekfac", "trak", "relatif"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(name, checkpoints, tmp_path, small):
    pooled, out = fit(name, checkpoints).over(POOL), tmp_path / "scores"
    want = pooled.attribute(TEST)
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            pooled.attribute(TEST, out=out)
    with pytest.MonkeyPatch.context() as patch:
        calls = stop(patch, -1)
        got = fit(name, checkpoints).over(POOL).attribute(TEST, out=out)
        assert len(calls) == 6 * checkpoints - 3
    assert np.array_equal(got.values, want.values.numpy())
    assert got.provenance["fitted_on"]["n_train"] == N
    assert got.shape == (40, 5)


def test_an_unfinished_run_is_not_gone_on_with_for_another_pool_or_fit(tmp_path, small):
    out, others = tmp_path / "scores", examples(N, seed=900)
    with pytest.MonkeyPatch.context() as patch:
        stop(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            fit().over(TRAIN).attribute(TEST, out=out)
    with pytest.raises(StoreError, match="unfinished run with another fitted_on "):
        fit().attribute(TEST, out=out)
    with pytest.raises(StoreError, match="unfinished run with another fitted_on "):
        fit(train=others).over(TRAIN).attribute(TEST, out=out)
    with pytest.raises(StoreError, match="unfinished run with another train "):
        fit().over(others).attribute(TEST, out=out)


def test_finished_scores_of_another_pool_or_fit_are_not_returned(tmp_path):
    out = tmp_path / "scores"
    fit().over(TRAIN).attribute(TEST, out=out)
    with pytest.warns(UserWarning, match="finished scores of this very call"):
        fit().over(TRAIN).attribute(TEST, out=out)
    with pytest.warns(UserWarning, match="finished scores with another fitted_on;"):
        fit().attribute(TEST, out=out)
    with pytest.warns(UserWarning, match="with another n_train and another train and another fit"):
        got = fit().over(POOL).attribute(TEST, out=out)
    assert got.shape == (40, 5)


def test_on_disk_both_sets_are_named_by_all_of_their_examples(tmp_path):
    """Sets of more than 64 examples that differ in one which a sampled fingerprint passes over."""

    class Listed(list):
        pass

    def items(seed, changed=None):
        inputs, labels = examples(100, seed=seed)
        if changed is not None:
            inputs[changed] += 1
        return Listed(zip(inputs, labels, strict=True))

    made = dattri.method("grad-dot")
    unseen = sorted(set(range(100)) - set(np.linspace(0, 99, 64).astype(int)))[0]
    one, other = (made.fit(task(), items(1, changed)) for changed in (None, unseen))
    facts = [
        f.over(items(2)).attribute(TEST, out=tmp_path / f"{at}").provenance
        for at, f in enumerate((one, other))
    ]
    assert one.train.fingerprint == other.train.fingerprint
    assert facts[0]["fitted_on"]["train"] == one.train.content
    assert facts[1]["fitted_on"]["train"] == other.train.content
    assert facts[0]["fitted_on"] != facts[1]["fitted_on"]


# --- stores and kept fits -------------------------------------------------------------------------
@pytest.mark.parametrize("checkpoints", [1, 2])
@pytest.mark.parametrize("name", ["trak", "logra-formed"])
def test_rows_of_a_pool_are_computed_beside_a_store_of_the_train_set(name, checkpoints, tmp_path):
    made = method(name.removesuffix("-formed"))
    fitted = made.fit(task(checkpoints), TRAIN, store=tmp_path / "rows", progress=False)
    fitted.attribute(TEST)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*")}
    reads = fitted.train.reads
    pooled = fitted.over(POOL)
    want = dense_scores(name.removesuffix("-formed"), POOL, checkpoints=checkpoints)
    for _ in range(2):
        got = pooled.attribute(TEST).values
        assert (got - want).abs().max() < 1e-9 * want.abs().max()
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*")}
    assert after == before  # the pool has no rows there
    assert fitted.train.reads - reads <= 8 * 4 * checkpoints  # samples of each fit, no pass
    assert pooled.train.reads >= 2 * len(POOL[1])
    own = pooled._fit(pooled._first()).outline
    assert own.work > 0
    assert any(note.startswith("store") for note in own.notes)


def test_kept_fits_are_those_of_the_train_set_of_the_fit(tmp_path):
    folder = tmp_path / "fits"
    fit(checkpoints=2, fits=folder).attribute(TEST)
    before = sorted(path.name for path in folder.iterdir())
    assert len(before) == 4  # two passes for each checkpoint
    fitted = fit(checkpoints=2, fits=folder)
    got = fitted.over(POOL).attribute(TEST).values
    assert sorted(path.name for path in folder.iterdir()) == before
    want = dense_scores("if-ekfac", POOL, checkpoints=2)
    assert (got - want).abs().max() < 1e-9 * want.abs().max()


# --- refusals -----------------------------------------------------------------------------------
def test_representer_values_are_terms_of_a_sum_over_the_train_set():
    fitted = dattri.method("rps-l2").fit(task(), TRAIN)
    assert isinstance(fitted.method.scorer, TermScorer)
    with pytest.raises(
        SpecError, match=r"^over: .*'representer' are the terms of a sum over.*fit "
    ):
        fitted.over(POOL)
    with pytest.raises(SpecError, match=r"^over: the scores of the scorer 'representer'"):
        fitted.with_(scorer="dot").over(POOL).with_(scorer="representer")
    changed = fitted.with_(scorer="dot").over(POOL)  # the fix that the message names
    assert changed.attribute(TEST).shape == (40, 5)


def wide():
    return examples(5, inputs=6)


def broken():
    inputs, labels = examples(5)
    inputs[3] = float("nan")
    return inputs, labels


def wrong_labels():
    return examples(5)[0], torch.full((5,), 7)


@pytest.mark.parametrize(
    ("pool", "error", "message"),
    [
        (wide, InputError, "^pool data: the model or the loss does not take them: RuntimeError"),
        (broken, NumericsError, "^pool data: .*not finite"),
        (wrong_labels, InputError, "^pool data: the model or the loss does not take them: Index"),
        (lambda: examples(5)[0], InputError, "^pool data: labels: "),
        (lambda: "a path", InputError, "^pool data: got a str"),
        (lambda: examples(0), InputError, "^pool data: empty"),
    ],
)
def test_what_the_task_does_not_take_is_refused_before_any_work(pool, error, message):
    fitted = fit("dual", 2)
    with pytest.raises(error, match=message):
        fitted.over(pool())


def test_where_nothing_is_fitted_yet_a_pool_is_tried_before_the_fit(monkeypatch):
    """It was taken by a source that the method has no more."""
    pool = tuple(side.clone() for side in POOL)
    pooled = dattri.method("embedding-similarity").fit(task(), TRAIN).over(pool)
    pooled = pooled.with_(source="per-example", inverse_hessian=method("dual").inverse_hessian)
    pool[1].fill_(7)
    fits = []
    monkeypatch.setattr(dattri.CurvatureInverse, "fit", lambda self, problem: fits.append(1))
    with pytest.raises(InputError, match=r"^pool data: the model or the loss"):
        pooled.attribute(TEST)
    assert not fits


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(11, 5), nn.Linear(5, 3)

    def forward(self, words):
        return self.out(self.words(words).mean(1))


def loader(lengths):
    made = torch.Generator().manual_seed(1)
    items = [(torch.randint(1, 11, (n,), generator=made), torch.tensor(n % 3)) for n in lengths]

    def pad(some):
        words = nn.utils.rnn.pad_sequence([words for words, _ in some], batch_first=True)
        return words, torch.stack([label for _, label in some])

    return DataLoader(items, batch_size=4, collate_fn=pad)


def test_padding_that_counts_is_found_in_the_pool_where_the_train_set_has_none():
    fitted = dattri.method("grad-dot").fit(Task(Mean().double()), loader([5] * 8))
    assert fitted.over(loader([4] * 6)).attribute(loader([5] * 2)).shape == (6, 2)
    with pytest.raises(InputError, match=r"depends on padding: pool example \d .*mask padding"):
        fitted.over(loader([4, 7, 2, 4, 9]))


def test_weights_that_changed_are_found():
    known = Task(nn.Linear(4, 3).double())
    fitted = dattri.method("if-ekfac").fit(known, TRAIN)
    pooled = fitted.over(POOL)
    with torch.no_grad():
        known.model.weight += 1
    for ask in (lambda: pooled.attribute(TEST), pooled.self_influence):
        with pytest.raises(InputError, match="weights changed since"):
            ask()


def test_a_scorer_of_columns_gives_no_self_influence_of_a_pool_either():
    with pytest.raises(SpecError, match=r"^self-influence"):
        dattri.method("knn-shapley").fit(task(), TRAIN).over(POOL).self_influence()
