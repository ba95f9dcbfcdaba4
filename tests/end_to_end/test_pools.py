"""`FittedMethod.over`: other examples scored by a fit, against dense algebra with its inverse."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.pools import (
    DUAL,
    PARTS,
    POOLS,
    TEST,
    TRAIN,
    M,
    N,
    dense_scores,
    dense_self,
    method,
    pool_of,
    task,
)
from oracles.routes import costs_seen
from oracles.toy_tasks import mlp
from torch.utils.data import DataLoader, Subset, TensorDataset

import dattri_core as dattri
from dattri_core import Task
from dattri_core import fitted as fitted_module
from dattri_core import run_plan as engine

BY_NAME = pytest.mark.parametrize("name", PARTS)
BY_POOL = pytest.mark.parametrize("pool", POOLS)


def fit(name, checkpoints=1, **options):
    return method(name).fit(task(checkpoints), TRAIN, progress=False, **options)


def close(got, want, tolerance=1e-9):
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


# --- numbers ------------------------------------------------------------------------------------
@BY_NAME
@BY_POOL
@pytest.mark.parametrize(("checkpoints", "memory"), [(1, None), (1, "1MiB"), (2, "1MiB")])
def test_scores_are_those_of_the_inverse_of_the_fit(name, pool, checkpoints, memory):
    fitted = fit(name, checkpoints, memory=memory)
    want = dense_scores(name, POOLS[pool], checkpoints=checkpoints)
    pooled = fitted.over(POOLS[pool])
    close(pooled.attribute(TEST).values, want)
    close(pooled.attribute(TEST).values, want)  # asked again, from the last checkpoint on
    close(fitted.attribute(TEST).values, dense_scores(name, TRAIN, checkpoints=checkpoints))


@pytest.mark.parametrize("name", ["if-ekfac", "relatif", "logra", "trak"])
@settings(max_examples=5, deadline=None)
@given(
    rows=st.lists(st.integers(0, 39), min_size=1, max_size=50),
    train_batch=st.integers(1, 9),
    query_group=st.integers(1, M),
    shard=st.integers(1, 50),
)
def test_neither_batches_nor_the_rest_of_the_pool_show(name, rows, train_batch, query_group, shard):
    original = engine.make_plan

    def plan(*arguments, **named):
        made = original(*arguments, **named)
        groups = -(-made.n_test // query_group)
        sizes = {"train_batch": train_batch, "query_group": query_group, "groups": groups}
        return attrs.evolve(made, **sizes, shard=shard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "make_plan", plan)
        got = fit(name).over(dattri.take(POOLS["more"], torch.tensor(rows))).attribute(TEST).values
    close(got, dense_scores(name, POOLS["more"])[rows])


@pytest.mark.parametrize("name", ["if-explicit", "if-ekfac", "dual", "relatif", "logra"])
@BY_POOL
def test_self_influence_is_of_the_examples_of_the_pool(name, pool):
    want = dense_self(name, POOLS[pool])
    close(fit(name).over(POOLS[pool]).self_influence(), want)
    close(fit(name).over(POOLS[pool]).attribute(POOLS[pool]).values.diagonal(), want)


def test_numbers_that_an_inverse_knows_of_its_rows_are_not_taken_for_a_pool():
    """In a pool of the size of the train set no position is out of range."""
    fitted = fit("relatif")
    assert fitted._held.chain.inverses[0].leverages
    pool = tuple(side.flip(0) for side in TRAIN)
    pooled = fitted.over(pool)
    close(pooled.attribute(TEST).values, dense_scores("relatif", pool))
    close(pooled.self_influence(), dense_self("relatif", pool))
    for damping, found in pooled.sweep(TEST, damping=[0.01, 0.3]).items():
        close(found.values, fitted.with_(damping=damping).attribute(TEST).values.flip(0))


@pytest.mark.parametrize("checkpoints", [1, 2])
@BY_POOL
def test_extremes_are_those_of_the_scores(pool, checkpoints):
    pooled = fit("logra", checkpoints).over(POOLS[pool])
    scores = pooled.attribute(TEST)
    top, bottom, test_ids, provenance = pooled.extremes(TEST, 4)
    for found, want in ((top, scores.top(4)), (bottom, scores.bottom(4))):
        assert (found.ids == want.ids).all()
        close(found.values, want.values)
    assert list(test_ids) == list(range(M))
    assert provenance["fitted_on"]["n_train"] == N


def test_readings_of_a_pool():
    pool, fitted = POOLS["fewer"], fit("if-ekfac", 2)
    want = dense_scores("if-ekfac", pool, checkpoints=2)
    pooled = fitted.over(pool)
    for by in ("block", "checkpoint"):
        parts = pooled.attribute(TEST, by=by)
        assert len(parts) == 2
        close(torch.stack([part.values for part in parts.values()]).sum(0), want)
    close(pooled.attribute(TEST, group=True).values, want.sum(1, keepdim=True))


@pytest.mark.parametrize("name", ["if-ekfac", "logra", "trak"])
def test_train_rows_are_those_of_the_pool(name):
    pooled = fit(name).over(POOLS["more"])
    left = torch.cat([rows.flat() for rows in pooled.train_rows()])
    right = torch.cat([rows.flat() for rows in pooled.test_rows(TEST)])
    want = pooled.with_(scorer="dot", fold="mean").attribute(TEST).values
    close(left @ right.T, want)
    assert len(left) == 40


# --- what is kept -------------------------------------------------------------------------------
@BY_NAME
def test_the_fit_is_not_made_again_and_the_train_set_is_not_read(name):
    fitted = fit(name)
    inverses, before = fitted._held.chain.inverses, fitted.train.reads
    pooled = fitted.over(POOLS["more"])
    pooled.attribute(TEST)
    assert pooled._held is fitted._held
    assert pooled._fit(pooled._first()).chain.inverses == inverses
    assert fitted.train.reads == before
    assert pooled.fitted_on is fitted.train
    assert len(pooled.train) == 40
    shown = repr(pooled)
    assert f"40 train examples by a fit on {N}, checkpoints: 1" in shown


def test_several_checkpoints_are_fitted_on_their_train_set_each_once(monkeypatch):
    sizes, original = [], fitted_module.fit_checkpoint

    def noted(*arguments, **named):
        sizes.append(len(arguments[5]))
        return original(*arguments, **named)

    monkeypatch.setattr(fitted_module, "fit_checkpoint", noted)
    pooled = fit("if-ekfac", 2).over(POOLS["more"])
    pooled.attribute(TEST)
    assert sizes == [N, N]


def test_changes_of_the_method_keep_the_pool_and_the_train_set_of_the_fit():
    pool = POOLS["fewer"]
    pooled = fit("dual").over(pool)
    damped = pooled.with_(damping=1.0)
    assert damped._held is not None  # no second fit
    want = fit("dual").with_(damping=1.0).attribute(TEST).values
    close(damped.over(TRAIN).attribute(TEST).values, want)
    close(damped.attribute(TEST).values[2:5], want[6:9])
    other = pooled.with_(scorer="relatif")
    close(other.attribute(TEST).values, dense_scores("relatif", pool))
    again = pooled.with_(inverse_hessian=method("if-explicit").inverse_hessian)
    assert again._held is None  # fitted anew when it is used
    close(again.attribute(TEST).values, dense_scores("if-explicit", pool))
    swept = pooled.sweep(TEST, damping=[0.05, 1.0])
    close(swept[0.05].values, dense_scores("dual", pool))
    close(swept[1.0].values, damped.attribute(TEST).values)


@pytest.mark.parametrize("name", ["if-ekfac", "logra", "trak", "relatif"])
def test_the_last_pool_counts_and_the_train_set_of_the_fit_is_no_pool(name):
    fitted = fit(name)
    first, second = POOLS.values()
    once, twice = fitted.over(second), fitted.over(first).over(second)
    assert torch.equal(twice.attribute(TEST).values, once.attribute(TEST).values)
    assert twice.attribute(TEST).provenance == once.attribute(TEST).provenance
    back = twice.over(fitted.train)
    assert torch.equal(back.attribute(TEST).values, fitted.attribute(TEST).values)
    assert back.attribute(TEST).provenance == fitted.attribute(TEST).provenance
    assert fitted.attribute(TEST).provenance["fitted_on"] is None


@pytest.mark.parametrize("name", ["grad-dot", "grad-norm", "embedding-similarity", "knn-shapley"])
def test_a_method_without_a_fit_scores_a_pool_as_its_train_set(name):
    """A column of KNN-Shapley is the game of the pool alone."""
    pool = POOLS["more"]
    made = dattri.method(name)
    want = made.attribute(task(), pool, TEST).values
    assert torch.equal(made.fit(task(), TRAIN).over(pool).attribute(TEST).values, want)


def test_steps_of_adam_are_made_of_the_moments_of_the_checkpoint():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    torch.nn.functional.cross_entropy(model(TRAIN[0]), TRAIN[1]).backward()
    optimizer.step()
    state = dattri.AdamState.of(optimizer, model)
    known = Task(model, optimisers=state, learning_rates=[0.1])
    less = dattri.method("less", dim=8)
    got = less.fit(known, TRAIN).over(POOLS["more"]).attribute(TEST).values
    close(got, less.attribute(known, POOLS["more"], TEST).values)


def test_a_refitted_layer_gives_rows_of_other_examples():
    made = dattri.Method(source={"name": "last-layer", "l2": 0.1})
    pooled = made.fit(task(), TRAIN).over(POOLS["fewer"])
    head = pooled._held.chain.source.head.weight
    inputs = {"pool": POOLS["fewer"], "test": TEST}
    f = {}
    for name, (x, _) in inputs.items():
        hidden = torch.tanh(mlp()[0](x)).detach()
        f[name] = torch.cat([hidden, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    classes = torch.eye(3, dtype=torch.float64)
    slope = (f["pool"] @ head.T).softmax(1) - classes[POOLS["fewer"][1]]
    want = -(slope @ classes[TEST[1]].T) * (f["pool"] @ f["test"].T)
    close(pooled.attribute(TEST).values, want)


# --- data, plans and facts ------------------------------------------------------------------------
def test_ids_are_those_of_the_pool_whatever_it_is_given_as():
    fitted, pool = fit("if-ekfac"), POOLS["more"]
    want = dense_scores("if-ekfac", pool)
    data = TensorDataset(*pool)
    scores = fitted.over(DataLoader(data, batch_size=7, sampler=[5, 1, 30])).attribute(TEST)
    assert list(scores.train_ids) == [5, 1, 30]
    close(scores.values, want[[5, 1, 30]])
    close(fitted.over(Subset(data, [4, 2])).attribute(TEST).values, want[[4, 2]])
    streamed = DataLoader(data, batch_size=9)
    close(fitted.over(streamed).attribute(TEST).values, want)


def test_the_provenance_names_both_sets_and_effects_are_of_the_train_set_of_the_fit():
    fitted, pool = fit("if-ekfac"), POOLS["more"]
    own, scores = fitted.attribute(TEST), fitted.over(pool).attribute(TEST)
    facts = scores.provenance
    assert facts["n_train"] == 40
    assert facts["train"] != own.provenance["train"]
    assert facts["fitted_on"] == {"n_train": N, "train": own.provenance["train"]}
    changed = {key for key in facts if facts[key] != own.provenance[key]}
    assert changed == {"n_train", "train", "fitted_on"}
    close(scores.removal_effect()[2:5], own.removal_effect()[6:9])
    close(scores.removal_effect(), scores.values / N)


@pytest.mark.parametrize("name", ["logra", "trak", "relatif"])
def test_the_plan_counts_rows_that_are_computed_and_says_so(name):
    fitted = fit(name)
    pooled = fitted.over(POOLS["more"])
    own, pool = (f._fit(f._first()).outline for f in (fitted, pooled))
    kept = own.held > 0
    assert kept == (name == "trak")  # sketched rows of the train set are kept in memory
    assert (own.work == 0) == kept
    assert pool.work > 0
    assert pool.kept >= own.held  # which go on being there
    assert pool.notes[0] == "pool              40 examples in place of the train set, rows computed"
    measured = [outline.measures(fitted.method.scorer) for outline in (own, pool)]
    assert measured == [False, name == "relatif"]
    seen = [costs_seen(lambda f=f: f.attribute(TEST)) for f in (fitted, pooled)]
    assert (seen[0] != seen[1]) == (name != "logra")


def test_longer_examples_of_a_pool_are_planned_for():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    loss = dattri.Loss(
        forward=lambda net, batch: net(batch[0]).mean(1),
        criterion=lambda out, batch: torch.nn.functional.cross_entropy(
            out, batch[1], reduction="none"
        ),
    )
    sets = [(torch.randn(6, length, 4), torch.arange(6) % 3) for length in (2, 500)]
    fitted = dattri.method("grad-dot").fit(Task(model, loss=loss), sets[0])
    pooled = fitted.over(sets[1])
    short, long = (f._fit(f._first()).outline for f in (fitted, pooled))
    assert long.activations >= 500 * 8 * 4 > 50 * short.activations
    assert long.row.nbytes > short.row.nbytes


def test_a_pool_of_one():
    one = pool_of(1, shared=0)
    close(fit("logra").over(one).attribute(TEST).values, dense_scores("logra", one))
    close(
        dattri.Method(**DUAL, scorer="relatif").fit(task(), TRAIN).over(one).attribute(TEST).values,
        dense_scores("relatif", one),
    )
