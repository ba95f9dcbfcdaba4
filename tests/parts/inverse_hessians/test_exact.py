"""Which curvature is inverted exactly, and by which route."""

from __future__ import annotations

import logging
import math
import re

import pytest
import torch
from dattri_parts.curvatures.fisher_information import Fisher
from dattri_parts.curvatures.gauss_newton import GaussNewton
from dattri_parts.curvatures.ggn import GGN
from dattri_parts.curvatures.hessian import Hessian
from dattri_parts.curvatures.kfac import KFAC
from dattri_parts.curvatures.leading_ggn import LeadingGGN
from dattri_parts.inverse_hessians.exact import Exact
from dattri_parts.solvers.cholesky import Cholesky
from dattri_parts.solvers.forecast import Forecast, Group
from dattri_parts.solvers.spectral import Spectral
from dattri_parts.solvers.woodbury import Woodbury
from oracles.networks import NETWORKS, dense_ggn, network, problem_of, solved

import dattri_core as dattri
from dattri_core import (
    CurvatureInverse,
    Damping,
    MemoryBudgetError,
    Rows,
    SpecError,
    format_bytes,
)
from dattri_core.laws.oracles import hessian, row_matrix
from dattri_core.problem import TrainProblem

CPU = torch.device("cpu")


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
    problem = problem_of(*network("perceptron"))
    damping = Damping(0.3)
    for curvature, solver in (
        (Hessian(), Cholesky(damping)),
        (GGN(), Woodbury(damping)),
        (Fisher(), Woodbury(damping)),
        (GaussNewton(block=True), Woodbury(damping)),
        (KFAC(), Spectral(damping)),
    ):
        exact = Exact(curvature, damping)
        route = exact.route(problem)
        assert (route.stage, route.place) == (CurvatureInverse(curvature, solver), 0)
        assert exact.needs == route.stage.needs
        never = Exact(curvature, damping, largest=0).route(problem)
        assert never.stage.curvature == (GGN() if curvature == Hessian() else curvature)
        assert never.place == (curvature == Hessian())
    fisher = Exact(substitute=Fisher(draws=4), largest=0)
    assert fisher.route(problem).stage == CurvatureInverse(Fisher(draws=4), Woodbury(1e-3))
    assert "Hessian" in fisher.foresee(problem).note
    assert "the sampled Fisher takes its place" in fisher.foresee(problem).note
    spectral = Exact(substitute=KFAC(), largest=0).route(problem)
    assert spectral.stage == CurvatureInverse(KFAC(), Spectral(1e-3))


# --- which substitute, by the bytes of its rows -------------------------------------------------
def foretold(curvature, name, n, batch):
    """Return the bytes that it takes to hold the rows of a curvature, and to read them again."""
    forecast = Forecast.of(curvature.fit(problem_of(*network(name, n), batch=batch)))
    return forecast.nbytes, math.ceil(forecast.matrix_bytes + forecast.example_bytes)


@pytest.mark.parametrize("batch", [3, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_substitute_is_the_first_whose_gram_matrix_fits_the_memory(name, batch, caplog):
    n = 20
    task, train = network(name, n)
    rows = queries(name)
    space = problem_of(task, train).space
    exact = Exact(damping=0.1, largest=0)
    gradients = row_matrix(task, space, train)
    wanted = {1.0: dense_ggn(task, space, train), 2.0: gradients.T @ gradients / n}
    wants = {place: solved(matrix, 0.1, rows.flat()) for place, matrix in wanted.items()}
    assert gap(wants[1.0], wants[2.0]) > 0.01  # the GGN's inverse is another

    places = {1.0: GGN(), 2.0: Fisher(kind="empirical")}
    sizes = {place: foretold(c, name, n, batch) for place, c in places.items()}
    held, least = sizes[1.0][0], {place: min(size) for place, size in sizes.items()}
    cases = [(1.0, int(1.2 * held)), (1.0, least[1.0]), (2.0, least[1.0] - 1), (2.0, least[2.0])]
    for place, memory in cases:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dattri"):
            inverse = exact.fit(problem_of(task, train, batch=batch, memory=memory))
        [record] = caplog.records
        called = {1.0: "GGN", 2.0: "empirical Fisher"}[place]
        assert f"the {called} takes its place" in record.message
        assert ("not the GGN: " in record.message) == (place == 2.0)
        holds = memory >= sizes[place][0]
        assert inverse.stats["rows_held"] == holds
        said = "rows are held (" if holds else "are not held but read again: "
        assert said in record.message
        assert ("store=" in record.message) != holds
        assert gap(inverse.apply(rows).flat(), wants[place]) < 1e-8
        assert inverse.stats["substituted"] == place
        again = inverse.with_damping(Damping(2.0))
        want = solved(wanted[place], 2.0, rows.flat())
        assert gap(again.apply(rows).flat(), want) < 1e-8
        assert again.stats["substituted"] == place

    with pytest.raises(MemoryBudgetError) as refused:
        exact.fit(problem_of(task, train, batch=batch, memory=least[2.0] - 1))
    message = str(refused.value)
    assert f"the Hessian of {space.dim} parameters" in message
    assert "the GGN cannot take its place (" in message
    assert re.search(
        r"nor the empirical Fisher \((at least )?\d+ rows and what inverts them", message
    )
    assert f"{format_bytes(least[2.0] - 1)} may be used" in message
    assert "give a larger memory=" in message
    assert "'cg'" in message


def test_no_substitute_is_tried_before_it_is_known_to_fit(monkeypatch):
    """The rows of a few examples are read, where a pass would read those of 400."""
    task, train = network("perceptron", 400)
    read = []
    rows = TrainProblem.rows

    def counted(self, *args, kind="loss", **options):
        for part in rows(self, *args, kind=kind, **options):
            read.append((kind, len(part)))
            yield part

    monkeypatch.setattr(TrainProblem, "rows", counted)
    with pytest.raises(MemoryBudgetError, match=r"at least 800 rows .*at least 400 rows "):
        Exact(largest=0).fit(problem_of(task, train, batch=4, memory=2000))
    assert {kind for kind, _ in read} == {"ggn", "loss"}
    assert sum(count for _, count in read) <= 2 * (2 * 8 + 4)


@pytest.mark.parametrize("n", [5, 8, 30])
@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize(
    "curvature",
    [GGN(), Fisher(kind="empirical"), Fisher(draws=3), GaussNewton(block=True), LeadingGGN(2)],
)
def test_a_forecast_is_what_is_held(curvature, batch, n):
    problem = problem_of(*network("reader", n), batch=batch)
    operator = curvature.fit(problem)
    forecast = Forecast.of(operator)
    stats = Woodbury(1.0).solve_for(operator, CPU).stats
    assert forecast.whole
    assert forecast.fits
    assert forecast.rows == sum(len(rows) for rows in operator.rows())
    if stats["dual_blocks"] == len(forecast.groups):
        held = stats["row_bytes"] + stats["factor_bytes"]
        assert forecast.nbytes == pytest.approx(held, rel=0.1)


def test_a_forecast_counts_the_moments_of_short_rows():
    short, long = Group(size=4, row_bytes=10.0), Group(size=100, row_bytes=10.0)
    assert Forecast(5, (short,), 0, 5).nbytes == 8 * 25 + 50
    assert Forecast(6, (short,), 0, 6).nbytes == 16 * 16  # 6 = 1.5 * 4 rows
    assert Forecast(6, (short, long), 0, 6).nbytes == 16 * 16 + 8 * 36 + 60
    many = Forecast(10**6, (Group(size=4, row_bytes=1000.0),), 0, 10**6)
    assert many.nbytes == 8 * 25 + 5000  # held just before they are summed


def test_a_forecast_counts_tiles_and_readings():
    # 20 rows of 1000 bytes, two an example; a Gram matrix and its factor take 16 * 400.
    def with_room(room):
        return Forecast(20, (Group(size=100, row_bytes=1e3, work=7.0),), 6400 + room, 10)

    for room, tile, tiles in ((2000, 1, 10), (5000, 2, 5), (6500, 3, 4), (11000, 5, 2)):
        forecast = with_room(room)
        assert (forecast.tile, forecast.tiles) == (tile, tiles)
        assert forecast.streams
        assert forecast.readings == (tiles + 1) / 2
    assert not with_room(1999).possible
    assert with_room(2000).possible
    assert with_room(0).pairs == 7 * 20 * 20 / 2
    assert Forecast(20, (Group(100, 100.0),), 8 * 400 + 2000, 10).fits
    assert not Forecast(20, (Group(100, 100.0),), 8 * 400 + 1999, 10).fits
    short = Forecast(20, (Group(4, 1e9), Group(100, 100.0)), 16 * 16 + 6400 + 200, 10)
    assert (short.streams, short.tile) == (True, 1)  # rows that are summed are not held


@pytest.mark.parametrize("functional", [False, True])
def test_a_loss_that_gives_no_rows_of_the_ggn_leaves_the_empirical_fisher(functional, caplog):
    task, train = network("perceptron")

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def of_parameters(parameters, batch):
        outputs = torch.func.functional_call(task.model, parameters, batch[0])
        return torch.nn.functional.cross_entropy(outputs, batch[1], reduction="sum")

    whole = dattri.Task(task.model, loss=dattri.functional(of_parameters) if functional else loss)
    source = "functional" if functional else "per-example"
    method = dattri.method("if-explicit", damping=0.1, largest=3, source=source)
    with caplog.at_level(logging.WARNING, "dattri"):
        found = method.attribute(whole, train, train)
    assert "outputs and the criterion apart" in caplog.text
    assert "the empirical Fisher takes its place" in caplog.text
    assert found.provenance["solver"][0]["substituted"] == 2.0
    gradients = row_matrix(task, problem_of(task, train).space, train)
    moment = gradients.T @ gradients / len(gradients)
    want = gradients @ solved(moment, 0.1, gradients).T
    assert gap(torch.as_tensor(found.values), want) < 1e-8
    plan = method.attribute(whole, train, train, dry_run=True)
    assert "the empirical Fisher takes its place" in str(plan)


def test_a_dry_run_tells_the_substitute_that_the_run_takes():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(600, 500), torch.nn.Tanh(), torch.nn.Linear(500, 3))
    inputs, labels = torch.randn(300, 600, generator=generator), torch.arange(300) % 3
    task, train, test = dattri.Task(model), (inputs, labels), (inputs[:4], labels[:4])
    method = dattri.method("if-explicit", damping=0.1)
    for memory, curvature, place in (("64MiB", "GGN", 1.0), ("6MiB", "empirical Fisher", 2.0)):
        plan = method.attribute(task, train, test, memory=memory, dry_run=True)
        assert f"the {curvature} takes its place" in str(plan)
        scores = method.attribute(task, train, test, memory=memory)
        assert scores.provenance["solver"][0]["substituted"] == place
    leading = dattri.method("if-explicit", damping=0.1, fallback="leading-ggn")
    assert "the LeadingGGN takes its place" in str(
        leading.attribute(task, train, test, memory="6MiB", dry_run=True)
    )
    got = leading.attribute(task, train, test, memory="6MiB").values
    woodbury = dattri.method("if-woodbury", curvature="leading-ggn", damping=0.1)
    want = woodbury.attribute(task, train, test).values
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), rtol=1e-3, atol=1e-4)
    for dry_run in (True, False):
        with pytest.raises(MemoryBudgetError, match="nor the empirical Fisher"):
            method.attribute(task, train, test, memory="2MiB", dry_run=dry_run)


def test_a_plan_knows_that_answers_of_a_substitute_are_not_formed():
    task, train = network("perceptron")
    inverse = Exact(largest=0).fit(problem_of(task, train))
    assert not inverse.forms
    assert inverse.base == 16
    written = Exact(substitute=KFAC(), largest=0).fit(problem_of(task, train))
    assert getattr(written, "forms", True)
    assert getattr(written, "base", 0) == 0


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
