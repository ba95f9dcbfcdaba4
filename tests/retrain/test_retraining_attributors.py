"""Attributors that train again: their values, sign, scale, and what they need."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from closed_games import enumerate_banzhaf, enumerate_semivalue
from dattri_parts.training import leave_one_out, random_subsets
from dattri_retrain import CounterfactualStore, LinearFit, ridge_datamodel
from toy_retraining import M, N, Toy, toy_data

import dattri_core as dattri
from dattri_core import Counterfactual, InputError, Scores, SpecError, Task

METHODS = (
    "leave-one-out",
    "datamodels",
    "shapley",
    "tmc-shapley",
    "beta-shapley",
    "banzhaf",
    "data-oob",
)
SMALL = 7


def margin(model, batch):
    return (model(batch[0]).squeeze(-1) * batch[1].sign()).flatten()


MARGIN = dattri.Target(margin, higher_is_better=True)
MARGIN = attrs.evolve(MARGIN, name="margin") if attrs.has(type(MARGIN)) else MARGIN


def question(n=N, target=None):
    """A task and its data; the model itself is never asked."""
    model = torch.nn.Linear(3, 1, bias=False).double()
    (x, y), (x_test, y_test) = toy_data(n)
    train = torch.from_numpy(x), torch.from_numpy(y)[:, None]
    test = torch.from_numpy(x_test), torch.from_numpy(y_test)[:, None]
    return Task(model, "squared-error", target=target), train, test


def run(name, truth, n=N, target=None, **fields):
    task, train, test = question(n, target)
    made = dattri.method(name, ground_truth=truth, **fields)
    return made.attribute(task, train, test, progress=False)


def values(scores):
    return np.asarray(scores.values)


def full(n, seed=0):
    return Counterfactual(np.ones(n, bool), seed)


def toy_game(toy, sign, target, empty, seed=0):
    """U of the toy, by training every set that is asked for."""

    def utility(masks):
        rows = [
            sign * toy.expected([Counterfactual(mask, seed)], target)[0] if mask.any() else empty
            for mask in masks
        ]
        return np.stack(rows)

    return utility


# --- leave-one-out --------------------------------------------------------------------------------
@pytest.mark.parametrize(("target", "name"), [(None, "loss"), (MARGIN, "margin")])
def test_leave_one_out_is_the_change_of_the_target_itself(tmp_path, target, name):
    toy = Toy()
    scores = run("leave-one-out", CounterfactualStore(tmp_path, toy), target=target)
    before = toy.expected([full(N)], name)
    after = toy.expected(leave_one_out(N), name)
    assert np.allclose(scores.removal_effect().numpy(), after - before, atol=1e-12)
    # Positive helps: without it the loss is higher, or the margin lower.
    helps = after > before if name == "loss" else after < before
    assert np.array_equal(values(scores) > 0, helps)
    assert toy.trained == N + 1
    facts = scores.provenance
    assert facts["ground_truth"]["fingerprint"] == toy.fingerprint
    assert facts["ground_truth"]["target"] == name
    assert facts["method"] == {"name": "leave-one-out", "seeds": 1, "seed": 0}


def test_leave_one_out_over_seeds_is_their_mean_with_an_error(tmp_path):
    store = CounterfactualStore(tmp_path, Toy(steps=3))
    each = np.stack([values(run("leave-one-out", store, seed=s)) for s in range(4)])
    scores = run("leave-one-out", store, seeds=4)
    assert np.allclose(values(scores), each.mean(0))
    error = each.std(0, ddof=1).max() / 2
    assert scores.provenance["estimate"]["largest_standard_error"] == pytest.approx(error)
    assert error > 0


# --- datamodels -----------------------------------------------------------------------------------
def test_datamodels_are_the_ridge_regression_of_utilities(tmp_path):
    toy = Toy()
    scores = run("datamodels", CounterfactualStore(tmp_path, toy), count=40, strength=0.5, seed=3)
    plan = random_subsets(N, 40, seed=3)
    masks = np.stack([c.mask for c in plan])
    fit: LinearFit = ridge_datamodel(masks, toy.expected(plan, "loss"), 0.5)
    assert np.allclose(values(scores), -N * fit.weights, atol=1e-9)
    assert np.allclose(scores.removal_effect().numpy(), -fit.weights, atol=1e-12)
    assert len(scores.provenance["estimate"]["strength"]) == M
    chosen = run("datamodels", CounterfactualStore(tmp_path, toy), count=40, seed=3)
    assert toy.trained == 40
    assert chosen.provenance["estimate"]["strength"] != [0.5] * M


@attrs.frozen(eq=False)
class AdditiveTruth:
    """An outcome that is a sum over the examples: every estimator must find its weights."""

    weights: np.ndarray

    def outcomes(self, counterfactuals, target):
        assert target == "loss"
        return 1.0 - np.stack([c.mask @ self.weights for c in counterfactuals])


ADDITIVE = AdditiveTruth(np.random.default_rng(0).normal(size=(N, M)))


@pytest.mark.parametrize(
    ("name", "fields", "scale"),
    [
        ("leave-one-out", {}, N),
        ("shapley", {"budget": 300, "empty": 1.0}, 1),
        ("tmc-shapley", {"budget": 300, "truncation": 0.0, "empty": 1.0}, 1),
        ("banzhaf", {"budget": 400, "empty": 1.0}, 1),
        ("datamodels", {"count": 60, "strength": 1e-9}, N),
        ("datamodels", {"count": 60, "strength": 1e-9, "penalty": "lasso"}, N),
    ],
)
def test_an_additive_outcome_gives_its_weights(name, fields, scale):
    found = values(run(name, ADDITIVE, **fields)) / scale
    want = ADDITIVE.weights
    if name == "datamodels":  # subsets of one size: only differences of weights show
        found, want = found - found.mean(0), want - want.mean(0)
    if name == "banzhaf":  # the only one that is not exact
        sampled = dattri.method(name, ground_truth=ADDITIVE, **fields).estimate(*question())
        assert (np.abs(found - want) <= 4.5 * sampled.errors).all()
        assert sampled.errors.max() < 0.3
    else:
        assert np.allclose(found, want, atol=1e-2 if "penalty" in fields else 1e-6)


# --- values by sampling ---------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "shape"), [("shapley", (1.0, 1.0)), ("beta-shapley", (16.0, 1.0))]
)
@pytest.mark.parametrize(("target", "outcome"), [(None, "loss"), (MARGIN, "margin")])
def test_values_are_those_of_all_sets_of_retrained_models(tmp_path, name, shape, target, outcome):
    from dattri_retrain import beta_weights

    toy = Toy(n_train=SMALL)
    store = CounterfactualStore(tmp_path, toy)
    sign = -1.0 if outcome == "loss" else 1.0
    empty = 2.0
    made = dattri.method(name, ground_truth=store, budget=2000, empty=empty)
    found = made.estimate(*question(SMALL, target), progress=False)
    game = toy_game(toy, sign, outcome, np.full(M, sign * empty))
    exact = enumerate_semivalue(game, SMALL, beta_weights(SMALL, *shape))
    assert (np.abs(found.values - exact) <= 4.5 * found.errors).all()
    assert np.abs(exact).max() > 5 * found.errors.max()
    assert toy.trained <= 2**SMALL - 1  # what was trained once is answered again
    scores = made.attribute(*question(SMALL, target), progress=False)
    assert np.array_equal(values(scores), found.values)
    facts = scores.provenance["estimate"]
    assert facts["stopped"] == "budget"
    assert facts["largest_standard_error"] == pytest.approx(found.errors.max())
    assert facts["data_value_standard_errors"] == pytest.approx(found.mean_errors.tolist())


def test_banzhaf_values_are_those_of_all_sets_of_retrained_models(tmp_path):
    toy = Toy(n_train=SMALL)
    store = CounterfactualStore(tmp_path, toy)
    made = dattri.method("banzhaf", ground_truth=store, budget=3000, empty=1.0)
    found = made.estimate(*question(SMALL), progress=False)
    exact = enumerate_banzhaf(toy_game(toy, -1.0, "loss", np.full(M, -1.0)), SMALL)
    assert (np.abs(found.values - exact) <= 4.5 * found.errors).all()
    assert np.abs(exact).max() > 5 * found.errors.max()


def test_the_target_of_no_train_set_moves_a_column_alike(tmp_path):
    store = CounterfactualStore(tmp_path, Toy())
    low, high, default = (
        values(run("shapley", store, budget=300, empty=e)) for e in (0.0, 5.0, None)
    )
    ones = np.eye(N, dtype=bool)
    assert np.allclose((high - low).sum(0), 5.0)
    whole = -Toy().expected([full(N)], "loss")[0]
    assert np.allclose(low.sum(0), whole)
    alone = -Toy().expected([Counterfactual(mask) for mask in ones], "loss")
    implied = whole - default.sum(0)
    assert (implied >= alone.min(0)).all()
    assert (implied <= alone.max(0)).all()


def test_truncation_trains_fewer_models(tmp_path):
    plain, short = Toy(), Toy()
    run("shapley", CounterfactualStore(tmp_path / "a", plain), budget=300)
    run(
        "tmc-shapley",
        CounterfactualStore(tmp_path / "b", short),
        budget=300,
        truncation=0.5,
        tolerance=1e3,
    )
    assert short.trained < plain.trained


def test_data_oob_is_of_the_train_examples(tmp_path):
    @attrs.frozen(eq=False)
    class OnTrain(Toy):
        """The test examples are the train examples."""

        @property
        def data(self):
            train, _ = toy_data(self.n_train)
            return train, train

    toy = OnTrain(n_test=N)
    scores = run("data-oob", CounterfactualStore(tmp_path, toy), count=30)
    plan = random_subsets(N, 30, fraction=1 - np.exp(-1.0))
    losses = toy.expected(plan, "loss")
    out = ~np.stack([c.mask for c in plan])
    for i in range(N):
        assert np.allclose(values(scores)[i], -losses[out[:, i], i].mean())
    assert scores.shape == (N, M)
    with pytest.raises(InputError, match=r"12 train and 12 test examples, and .* has 12 and 5"):
        run("data-oob", CounterfactualStore(tmp_path, Toy()), count=30)


# --- what they need -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_without_a_ground_truth_they_say_what_is_missing(name):
    with pytest.raises(SpecError, match=r"trained again.*ground_truth=CounterfactualStore"):
        dattri.attribute(*question(), method=name)


@pytest.mark.parametrize("name", METHODS)
def test_a_dry_run_trains_nothing_and_says_how_much_there_is(tmp_path, name):
    toy = Toy(n_test=N if name == "data-oob" else M)
    task, train, test = question()
    made = dattri.method(name, ground_truth=CounterfactualStore(tmp_path, toy))
    said = made.attribute(task, train, test, dry_run=True)
    assert "models" in said
    assert toy.trained == 0


@pytest.mark.parametrize("name", ["leave-one-out", "shapley", "data-oob"])
def test_scores_are_written_to_a_folder_too(tmp_path, name):
    toy = Toy(n_test=N if name == "data-oob" else M)
    store = CounterfactualStore(tmp_path / "store", toy)
    task, train, test = question()
    fields = {"count": 30} if name == "data-oob" else {}
    made = dattri.method(name, ground_truth=store, **fields)
    if name == "shapley":
        made = attrs.evolve(made, budget=300)
    kept = made.attribute(task, train, test, progress=False)
    made.attribute(task, train, test, progress=False, out=tmp_path / "scores")
    read = Scores.load(tmp_path / "scores")
    assert np.array_equal(values(read), values(kept))
    assert read.provenance == kept.provenance


def test_a_ground_truth_of_something_else_is_refused_before_training(tmp_path):
    toy = Toy()
    store = CounterfactualStore(tmp_path, toy)
    task, train, test = question(N + 1)
    made = dattri.method("leave-one-out", ground_truth=store)
    with pytest.raises(InputError, match=r"got 13 train and 5 test examples, and .* has 12 and 5"):
        made.attribute(task, train, test)
    wrong_way = attrs.evolve(MARGIN, higher_is_better=False)
    with pytest.raises(SpecError, match="less is better and the retraining the opposite"):
        made.attribute(*question(target=wrong_way))
    other = attrs.evolve(MARGIN, name="logit")
    with pytest.raises(SpecError, match="asks for 'logit', and the retraining measures 'loss'"):
        made.attribute(*question(target=other))
    with pytest.raises(SpecError, match="expected Outcomes"):
        dattri.method("leave-one-out", ground_truth=3)
    with pytest.raises(InputError, match=r"shape \(13, 2\), expected \(13, 5\)"):
        run("leave-one-out", AdditiveTruth(np.zeros((N, 2))))
    assert toy.trained == 0


def test_a_budget_that_is_too_small_is_refused_before_training(tmp_path):
    toy = Toy()
    for name, message in (("shapley", "which ask for 222"), ("banzhaf", "below 100")):
        with pytest.raises(InputError, match=message):
            run(name, CounterfactualStore(tmp_path, toy), budget=99)
    assert toy.trained == 0


def test_they_are_repeatable_and_resume_from_the_store(tmp_path):
    first, second = Toy(), Toy()
    a = run("shapley", CounterfactualStore(tmp_path, first), budget=300, seed=2)
    b = run("shapley", CounterfactualStore(tmp_path, second), budget=300, seed=2)
    assert np.array_equal(values(a), values(b))
    assert (first.trained > 0, second.trained) == (True, 0)
