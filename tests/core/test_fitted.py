"""A fitted method: what is computed again, what is not, and what is refused."""

from collections import Counter

import pytest
import torch
from oracles.toy_parts import (
    CountingSource,
    DividesByZero,
    FlatSketch,
    Gram,
    HessianColumns,
    Overflows,
    inverse,
)
from oracles.toy_tasks import cross_entropies, examples, flat_gradients, mlp, states, world

import dattri_core as dattri
from dattri_core import InputError, Method, NumericsError, SpecError, Task, contract, moments
from dattri_core.blocks import outer
from dattri_core.checkpoint import state_fingerprint
from dattri_core.runner import contractions

N, M = 13, 6


def close(left, right, tolerance=1e-12):
    return (left - right).abs().max() <= tolerance * right.abs().max()


# --- sweeps reuse what was fitted -----------------------------------------------------------------
@pytest.mark.parametrize("early", [True, False])
def test_another_damping_makes_no_second_fit_and_equals_a_fresh_one(early):
    hessian, counts = HessianColumns(), Counter()
    task, train, test = world(N, M)
    method = Method(CountingSource(counts), inverse_hessian=inverse(hessian, 1.0))
    fitted = method.fit(task, train)
    if not early:
        fitted.attribute(test)
    assert hessian.counts["fit"] == 1
    counts.clear()
    for damping in (0.3, 3.0):
        swept = fitted.with_(damping=damping)
        got = swept.attribute(test)
        fresh = Method(inverse_hessian=inverse(HessianColumns(), damping)).attribute(
            task, train, test
        )
        assert torch.equal(got.values, fresh.values)
        assert got.provenance["method"]["inverse_hessian"]["solver"]["damping"] is not None
        assert got.provenance["solver"][0]["damping"] == damping
    assert hessian.counts["fit"] == 1
    assert counts["bind"] == 0
    assert counts["train"] == 2 * N
    # The one before is left as it was.
    before = method.attribute(task, train, test)
    assert torch.equal(fitted.attribute(test).values, before.values)


def test_another_scorer_or_fold_reuses_all_stages():
    gram = Gram()
    task, train, test = world(N, M)
    method = Method(stages=[FlatSketch(9), inverse(gram)])
    fitted = method.fit(task, train)
    for changes in ({"scorer": "cosine"}, {"fold": "mean"}, {"scorer": "cosine", "damping": 0.5}):
        got = fitted.with_(**changes).attribute(test).values
        assert gram.counts["fit"] == 1
        assert torch.equal(got, _changed(method, changes).attribute(task, train, test).values)
        assert gram.counts["fit"] == 2
        gram.counts.clear()
        gram.counts["fit"] = 1


def _changed(method, changes):
    from dattri_core import assemble

    return Method(**assemble.override(assemble.slots_of(method), changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 7},
        {"size": 4},
        {"stages": [FlatSketch(9), inverse(HessianColumns(), 1.0)]},
        {"stages": [inverse(Gram(), 1.0), FlatSketch(9)]},
        {"stages": [FlatSketch(9)]},
    ],
)
def test_any_other_change_is_fitted_anew(changes):
    task, train, test = world(N, M)
    method = Method(stages=[FlatSketch(9), inverse(Gram(), 1.0)])
    fitted = method.fit(task, train)
    got = fitted.with_(**changes).attribute(test).values
    want = _changed(method, changes).attribute(task, train, test).values
    assert torch.equal(got, want)
    assert not torch.equal(got, fitted.attribute(test).values)


def test_a_sweep_over_several_checkpoints_equals_fresh_runs():
    train, test = examples(N), examples(M, seed=9)
    task = Task(mlp(), checkpoints=states(3))
    fitted = Method(inverse_hessian=inverse(Gram(), 1.0)).fit(task, train)
    fitted.attribute(test)
    for damping in (0.1, 1.0):
        want = Method(inverse_hessian=inverse(Gram(), damping)).attribute(task, train, test)
        swept = fitted.with_(damping=damping)
        assert torch.equal(swept.attribute(test).values, want.values)
        assert torch.equal(swept.attribute(test).values, want.values)


def test_several_test_sets_need_one_fit():
    gram = Gram()
    task, train, test = world(N, M)
    fitted = Method(inverse_hessian=inverse(gram)).fit(task, train)
    whole = fitted.attribute(test).values
    parts = [fitted.attribute((test[0][k : k + 2], test[1][k : k + 2])).values for k in (0, 2, 4)]
    assert close(torch.cat(parts, 1), whole)
    assert gram.counts["fit"] == 1


def test_with_checks_the_changed_method():
    task, train, _ = world(N, M)
    fitted = Method().fit(task, train)
    with pytest.raises(SpecError, match="learning_rates="):
        fitted.with_(fold="weighted")
    with pytest.raises(SpecError, match="dampin"):
        fitted.with_(dampin=1.0)


def test_with_a_named_recipe_reuses_the_hessian_of_the_cholesky_solver(monkeypatch):
    from dattri_core import problem

    products = Counter()
    original = problem.TrainProblem.product

    def count(self, vectors, kind):
        products["vectors"] += len(vectors)
        return original(self, vectors, kind)

    monkeypatch.setattr(problem.TrainProblem, "product", count)
    task, train, test = world(N, M)
    fitted = dattri.method("if-explicit", damping=1.0).fit(task, train)
    fitted.attribute(test)
    first = products["vectors"]
    assert first >= 43
    got = fitted.with_(damping=0.5).attribute(test).values
    assert products["vectors"] == first
    fresh = dattri.attribute(task, train, test, method="if-explicit", damping=0.5).values
    assert close(got, fresh, 1e-9)
    cg = dattri.method("if-cg", damping=1.0).fit(task, train)
    swept = cg.with_(damping=0.5).attribute(test).values
    assert close(swept, dattri.attribute(task, train, test, "if-cg", damping=0.5).values, 1e-9)


# --- self-influence -------------------------------------------------------------------------------
@pytest.mark.parametrize("scorer", ["dot", "cosine"])
@pytest.mark.parametrize(
    "stages", [[], [inverse(Gram())], [FlatSketch(9), inverse(HessianColumns(), 1.0)]]
)
@pytest.mark.parametrize("target", [None, "margin"])
def test_self_influence_is_the_diagonal_of_the_scores_of_the_train_set(scorer, stages, target):
    train = examples(N)
    weights, rates = states(2), [0.5, 2.0]
    task = Task(mlp(), checkpoints=weights, learning_rates=rates, target=target)
    plain = Task(mlp(), checkpoints=weights, learning_rates=rates)
    method = Method(stages=stages, scorer=scorer, fold="weighted")
    got = method.fit(task, train).self_influence()
    want = method.attribute(plain, train, train).values.diagonal()
    assert got.shape == (N,)
    assert close(got, want, 1e-10)


def test_self_influence_of_a_gradient_method_is_its_squared_norm():
    task, train, _ = world(N, M)
    norms = flat_gradients(task.model, cross_entropies(train)).square().sum(1)
    for memory in ("1MiB", "1GiB"):
        assert close(Method().fit(task, train, memory=memory).self_influence(), norms)


# --- refused --------------------------------------------------------------------------------------
@pytest.mark.parametrize("use", ["attribute", "self_influence", "swept"])
def test_weights_that_changed_after_the_fit_are_refused(use):
    task, train, test = world(N, M)
    fitted = Method(inverse_hessian=inverse(Gram())).fit(task, train)
    before = fitted.attribute(test).values
    with torch.no_grad():
        task.model[0].bias[0] += 1e-9
    calls = {
        "attribute": lambda: fitted.attribute(test),
        "self_influence": fitted.self_influence,
        "swept": lambda: fitted.with_(damping=1.0).attribute(test),
    }
    with pytest.raises(InputError, match="weights changed since the method was fitted"):
        calls[use]()
    with torch.no_grad():
        task.model[0].bias.copy_(mlp()[0].bias)
    assert torch.equal(fitted.attribute(test).values, before)


def test_weights_given_as_checkpoints_may_change_later():
    model, train, test = mlp(), examples(N), examples(M, seed=9)
    task = Task(model, checkpoints=model.state_dict())
    fitted = Method(inverse_hessian=inverse(Gram())).fit(task, train)
    before = fitted.attribute(test).values
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(fitted.attribute(test).values, before)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda x, y: (x[:, :-1], y), "RuntimeError: .*shapes cannot be multiplied"),
        (lambda x, y: (x, torch.full_like(y, 99)), "IndexError: .*out of bounds"),
    ],
)
def test_a_test_set_that_does_not_fit_is_refused_by_name_before_the_fit(spoil, reason):
    gram = Gram()
    task, train, test = world(N, M)
    method = Method(inverse_hessian=inverse(gram))
    message = f"^test data: the model or the target does not take them: {reason}.*; give "
    with pytest.raises(InputError, match=message):
        method.attribute(task, train, spoil(*test))
    assert gram.counts["fit"] == 0


def test_a_checkpoint_that_does_not_fit_is_refused_before_any_work():
    gram = Gram()
    weights = states(3)
    del weights[2]["2.bias"]
    task = Task(mlp(), checkpoints=weights)
    with pytest.raises(InputError, match=r"checkpoint 'state 2'.*missing \['2.bias'\]"):
        Method(inverse_hessian=inverse(gram)).attribute(task, examples(N), examples(M))
    assert gram.counts["fit"] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_names_checkpoint_example_and_block(bad):
    train, test = examples(N), examples(M, seed=9)
    train[0][8, 1] = bad
    task = Task(mlp(), checkpoints=states(1))
    with pytest.raises(NumericsError, match=r"checkpoint 'state 0'.*block '0', examples \[8\]"):
        Method().attribute(task, train, test)
    with pytest.raises(NumericsError, match=r"role 'test'.*checkpoint 'state 0'"):
        Method().attribute(task, test, train)


def test_a_score_that_is_not_finite_names_checkpoint_and_examples():
    task, train, test = world(N, M, checkpoints=states(1))
    with pytest.raises(NumericsError, match=r"checkpoint 'state 0', train example 8, query 0"):
        Method(scorer=Overflows(8)).attribute(task, train, test)


def test_a_query_that_is_not_finite_after_the_stages_names_checkpoint_and_blocks():
    task, train, test = world(N, M, checkpoints=states(1))
    with pytest.raises(NumericsError, match=r"queries.*checkpoint 'state 0'.*raise the damping"):
        Method(inverse_hessian=DividesByZero()).attribute(task, train, test)


# --- dry run --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("out", [None, "scores"])
@pytest.mark.parametrize(
    "stages",
    [[], [inverse(Gram())], [FlatSketch(9), inverse(Gram())], [inverse(Gram()), FlatSketch(9)]],
)
def test_a_dry_run_shows_the_plan_of_the_run_and_evaluates_a_few_examples(
    monkeypatch, tmp_path, stages, dtype, out
):
    from dattri_core.fitted import FittedMethod

    counts = Counter()
    task, train, test = world(200, 40, dtype=dtype)
    method = Method(CountingSource(counts), stages=stages)
    folder = None if out is None else tmp_path / out
    plan = method.attribute(task, train, test, dry_run=True, memory="1MiB", out=folder)
    assert counts["train"] + counts["test"] < 10
    assert (plan.n_train, plan.n_test, plan.checkpoints) == (200, 40, 1)
    assert f"{plan.train_passes} to score" in str(plan)
    assert not list(tmp_path.iterdir())
    used = []
    original = FittedMethod._plan

    def keep(self, *arguments):
        used.append(original(self, *arguments))
        return used[-1]

    monkeypatch.setattr(FittedMethod, "_plan", keep)
    method.attribute(task, train, test, memory="1MiB", out=folder)
    assert used == [plan]


def test_stats_are_those_of_the_inverses_of_the_fitted_checkpoint():
    task, train, _ = world(N, M)
    assert Method().fit(task, train).stats == [{}]
    assert Method(inverse_hessian=inverse(Gram(), 0.5)).fit(task, train).stats == [{"damping": 0.5}]


def test_the_provenance_says_what_was_done():
    train, test = examples(N), examples(M, seed=9)
    task = Task(
        mlp(), checkpoints=states(2), learning_rates=[0.1, 0.2], target="logit", parameters="2.*"
    )
    scores = dattri.attribute(task, train, test, method="tracin")
    facts = scores.provenance
    assert facts["method"] == dattri.method("tracin").to_spec()
    assert (facts["n_train"], facts["n_test"]) == (N, M)
    assert facts["target"] == {"name": "logit", "higher_is_better": True}
    assert facts["learning_rates"] == [0.1, 0.2]
    assert facts["checkpoints"] == ["state 0", "state 1"]
    assert facts["parameters"] == ["2.weight", "2.bias"]
    assert facts["loss"] == "cross-entropy"
    assert len(set(facts["weights"])) == 2


@pytest.mark.parametrize("given", [[None], states(2), [*states(1), None], [None, *states(1)]])
def test_the_provenance_names_weights_by_their_numbers(given):
    train, model = examples(N), mlp()
    for _ in range(2):
        task = Task(model, checkpoints=given)
        found = dattri.attribute(task, train, train, method="grad-dot").provenance["weights"]
        own = dict(model.named_parameters())
        assert found == [state_fingerprint(own if s is None else s) for s in given]
        with torch.no_grad():  # another model: another name
            next(model.parameters()).view(-1)[0] += 1e-6


def test_a_plan_counts_what_a_spectral_inverse_keeps():
    model = torch.nn.Linear(3, 2)
    batch = torch.randn(8, 3), torch.arange(8) % 2
    fitted = dattri.method("if-ekfac").fit(dattri.Task(model), batch, progress=False)
    kept = fitted._fit(fitted.checkpoints[0]).outline.kept
    # eigenvectors of both sides, with the bias; eigenvalues and weights; all in float32
    assert kept == 4 * (4 * 4 + 2 * 2 + 2 * (2 * 4))


def test_it_is_shown_without_its_data():
    data = torch.randn(20, 4), torch.randint(0, 3, (20,))
    fitted = dattri.method("if-ekfac").fit(dattri.Task(torch.nn.Linear(4, 3)), data, memory="64MiB")
    shown = repr(fitted)
    assert shown == (
        "FittedMethod(per-example, ekfac, spectral, dot; 20 train examples, checkpoints: 1; "
        "memory 64.0 MiB)"
    )
    assert "tensor(" not in repr(fitted.train)


# --- memory of products ---------------------------------------------------------------------------
def test_products_keep_to_a_share_of_the_budget_in_every_pass(monkeypatch):
    seen = []

    def noted():
        seen.append(contract.limit_now())
        return seen[-1]

    for module in (moments, outer):
        monkeypatch.setattr(module, "limit_now", noted)
    task, train, test = world(N, M)
    fitted = dattri.method("if-ekfac").fit(task, train, memory="64MiB")
    for run in (lambda: None, lambda: fitted.attribute(test), fitted.self_influence):
        run()
        assert seen
        assert set(seen) == {4 * 2**20}
        seen.clear()
    assert contract.limit_now() == contract.DEFAULT_LIMIT


def test_products_are_larger_on_an_accelerator():
    here, there = torch.device("cpu"), torch.device("cuda")
    assert contractions(2**33, here) == 2**28
    assert contractions(2**33, there) == 2**29
    assert contractions(2**40, there) == 2**32
