"""Which curvature is inverted exactly, and by which route."""

from __future__ import annotations

import logging

import pytest
import torch
from dattri_parts.curvatures.fisher_information import Fisher
from dattri_parts.curvatures.gauss_newton import GaussNewton
from dattri_parts.curvatures.ggn import GGN
from dattri_parts.curvatures.hessian import Hessian
from dattri_parts.curvatures.kfac import KFAC
from dattri_parts.inverse_hessians.exact import Exact
from dattri_parts.solvers.cholesky import Cholesky
from dattri_parts.solvers.spectral import Spectral
from dattri_parts.solvers.woodbury import Woodbury
from oracles.networks import NETWORKS, dense_ggn, network, problem_of, solved

import dattri_core as dattri
from dattri_core import CurvatureInverse, Damping, Rows, SpecError
from dattri_core.laws.oracles import hessian


def gap(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def queries(name):
    return Rows.concatenate(list(problem_of(*network(name, 5, 9)).rows()))


@pytest.mark.filterwarnings("ignore:solver 'cholesky'")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_hessian_where_it_can_be_written_down_else_the_ggn(name, caplog):
    task, train = network(name)
    problem = problem_of(task, train)
    rows, dim = queries(name), problem.space.dim
    with caplog.at_level(logging.WARNING, "dattri"):
        small = Exact(damping=0.1, largest=dim).fit(problem)
    assert not caplog.records
    want = solved(hessian(task, problem.space, train), 0.1, rows.flat())
    assert gap(small.apply(rows).flat(), want) < 1e-8
    assert "substituted" not in small.stats
    with caplog.at_level(logging.WARNING, "dattri"):
        large = Exact(damping=0.1, largest=dim - 1).fit(problem)
    [record] = caplog.records
    assert f"the Hessian of {dim} parameters" in record.message
    assert "the GGN takes its place" in record.message
    assert "Woodbury" in record.message
    matrix = dense_ggn(task, problem.space, train)
    assert gap(large.apply(rows).flat(), solved(matrix, 0.1, rows.flat())) < 1e-8
    assert large.stats["substituted"] == 1.0
    again = large.with_damping(Damping(2.0))
    assert gap(again.apply(rows).flat(), solved(matrix, 2.0, rows.flat())) < 1e-8
    assert again.stats["substituted"] == 1.0
    assert again.stats["damping"] == 2.0


def test_routes_are_told_from_the_space():
    space = problem_of(*network("perceptron")).space
    damping = Damping(0.3)
    for curvature, solver in (
        (Hessian(), Cholesky(damping)),
        (GGN(), Woodbury(damping)),
        (Fisher(), Woodbury(damping)),
        (GaussNewton(block=True), Woodbury(damping)),
        (KFAC(), Spectral(damping)),
    ):
        exact = Exact(curvature, damping)
        assert exact.route(space) == CurvatureInverse(curvature, solver)
        assert exact.needs == exact.route(space).needs
        never = Exact(curvature, damping, largest=0).route(space)
        assert never.curvature == (GGN() if curvature == Hessian() else curvature)
    fisher = Exact(substitute=Fisher(draws=4), largest=0)
    assert fisher.route(space) == CurvatureInverse(Fisher(draws=4), Woodbury(1e-3))
    assert "Hessian" in fisher.told(space)
    assert "Fisher takes its place" in fisher.told(space)


def test_a_loss_that_gives_no_rows_of_the_ggn_is_refused_with_the_cure():
    task, train = network("perceptron")

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    whole = dattri.Task(task.model, loss=loss)
    problem = problem_of(whole, train)
    with pytest.raises(SpecError, match="outputs and the criterion apart"):
        Exact(largest=3).fit(problem)


@pytest.mark.filterwarnings("ignore:solver 'cholesky'")
def test_if_explicit_runs_at_any_size_and_says_what_it_inverted():
    task, train = network("images")
    _, test = network("images", 4, 3)
    small = dattri.method("if-explicit", damping=0.5).attribute(task, train, test)
    large = dattri.method("if-explicit", damping=0.5, largest=10).attribute(task, train, test)
    ggn = dattri.method("if-explicit", damping=0.5, curvature="ggn").attribute(task, train, test)
    assert large.provenance["solver"][0]["substituted"] == 1.0
    assert "substituted" not in small.provenance["solver"][0]
    torch.testing.assert_close(large.values, ggn.values, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(large.values, small.values, rtol=1e-2)
    named = dattri.method("if-woodbury", damping=0.5).attribute(task, train, test)
    torch.testing.assert_close(named.values, ggn.values, rtol=1e-9, atol=1e-12)


def test_its_spec_holds_what_was_changed():
    assert dattri.method("if-explicit").to_spec()["inverse_hessian"] == "exact"
    changed = dattri.method("if-explicit", curvature="ggn", largest=100)
    assert changed.to_spec()["inverse_hessian"] == {
        "name": "exact",
        "curvature": "ggn",
        "largest": 100,
    }
    assert dattri.Method(**changed.to_spec()) == changed
    with pytest.raises(SpecError, match="largest"):
        dattri.method("if-explicit", largest=-1)


def test_a_dry_run_tells_which_curvature_it_will_be():
    task, train = network("images")
    method = dattri.method("if-explicit", largest=10)
    plan = method.attribute(task, train, train, dry_run=True)
    assert "the GGN takes its place" in str(plan)
    plan = dattri.method("if-explicit").attribute(task, train, train, dry_run=True)
    assert "Hessian of 204 parameters by Cholesky" in str(plan)


def test_a_plan_does_not_take_answers_that_are_not_formed_for_formed_ones():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(600, 500), torch.nn.Tanh(), torch.nn.Linear(500, 3))
    train = torch.randn(60, 600, generator=generator), torch.randint(3, (60,), generator=generator)
    task, size = dattri.Task(model), 4 * sum(p.numel() for p in model.parameters())
    unformed, formed = (
        dattri.method(name, damping=0.1).attribute(task, train, train, dry_run=True)
        for name in ("if-woodbury", "if-cg")
    )
    assert unformed.bytes["queries"] < 0.1 * 60 * size < formed.bytes["queries"]
