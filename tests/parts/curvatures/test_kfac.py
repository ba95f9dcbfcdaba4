"""K-FAC against its formula in dense float64 algebra, and where it is exact."""

import logging

import pytest
import torch
from dattri_parts.curvatures.kfac import KFAC
from dattri_parts.solvers.spectral import Spectral
from oracles.kronecker import (
    block_diagonal,
    block_of,
    empirical,
    factors_of,
    fisher,
    kfac,
    problem_of,
    softmax_ggn,
)
from oracles.kronecker_nets import LAYERS, NETS, N, labels, language, mlp, numbers, seeded
from torch import nn

import dattri_core as dattri
from dattri_core import CurvatureInverse, Method, SpecError, Task
from dattri_core.laws.oracles import row_matrix
from dattri_core.testing import PeakMemory

NET_NAMES = sorted(NETS)


def dense(curvature, task, train, **options):
    problem = problem_of(task, train, **options)
    return curvature.fit(problem).dense(), problem.space


def near(got, want, tolerance=1e-11):
    gap = float((got - want).abs().max())
    assert gap <= tolerance * float(want.abs().max()), f"off by {gap:.3e}"


# --- the formula --------------------------------------------------------------------------------
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("net", NET_NAMES)
def test_blocks_are_kronecker_products_of_sums_over_counted_positions(net, approximation):
    task, train = NETS[net]()
    curvature = KFAC(fisher="empirical", approximation=approximation)
    matrix, space = dense(curvature, task, train)
    near(matrix, block_diagonal(matrix, space), 0)
    for layer in LAYERS[net]:
        rows = factors_of(task, train, layer, empirical(task))
        reduce = approximation == "reduce" and layer != "embedding"
        near(block_of(matrix, space, layer), kfac(rows, N, reduce=reduce))


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_the_ggn_draws_nothing_and_sums_over_the_columns_of_the_criterion(net):
    task, train = NETS[net]()
    matrix, space = dense(KFAC(fisher="ggn"), task, train)
    for layer in LAYERS[net]:
        rows = factors_of(task, train, layer, softmax_ggn(task))
        near(block_of(matrix, space, layer), kfac(rows, N), 1e-10)


def test_many_draws_of_labels_come_to_the_ggn():
    task, train = mlp()
    want, _ = dense(KFAC(fisher="ggn"), task, train)
    errors = []
    for draws in (1, 64):
        got, _ = dense(KFAC(draws=draws), task, train)
        errors.append(float((got - want).norm() / want.norm()))
    assert errors[1] < 0.1
    assert errors[1] < errors[0]


def test_blocks_without_factors_take_the_diagonal_of_the_same_fisher():
    for fisher_kind in ("empirical", "sampled"):
        task, train = mlp()
        problem = problem_of(task, train)
        matrix = KFAC(fisher=fisher_kind).fit(problem).dense()
        kind = {"empirical": "loss", "sampled": "fisher"}[fisher_kind]
        rows = torch.cat([rows.flat() for rows in problem.rows(kind=kind)])
        diagonal = torch.diag(rows.square().mean(0))
        near(block_of(matrix, problem.space, "2"), block_of(diagonal, problem.space, "2"))


def test_a_tied_weight_has_the_positions_of_both_its_uses():
    """The block is (D, V): the embedding gives e (x) onehot, the head x (x) logit gradient."""
    task, train = language(tied=True)
    matrix, space = dense(KFAC(fisher="empirical"), task, train)
    embedding = factors_of(task, train, "embedding", empirical(task))
    head = factors_of(task, train, "head", empirical(task))
    rows = [
        (torch.cat([e, x]), torch.cat([h, g]))
        for (e, h), (g, x) in zip(embedding, head, strict=True)
    ]
    assert space["embedding.weight"].shape == (3, 7)
    where = slice(0, 21)  # the first block
    assert space.offsets["embedding.weight"] == 0
    near(matrix[where, where], kfac(rows, N))


def test_factors_of_an_embedding_are_never_of_its_size_squared():
    model = seeded(lambda: nn.Sequential(nn.Embedding(5000, 3), nn.Flatten(), nn.Linear(12, 3)))
    train = (labels(5000, N, 4, seed=1), labels(3, N, seed=2))
    task = Task(model, parameters="0.*")
    with PeakMemory() as memory:
        operator = KFAC().fit(problem_of(task, train, memory=2**24))
    assert memory.peak < 5000 * 5000
    (sides,) = operator.basis.sides.values()
    assert sides.inputs is None
    assert tuple(sides.outputs.shape) == (3, 3)


# --- where it is exact --------------------------------------------------------------------------
def regression(seed=0):
    model = seeded(lambda: nn.Linear(4, 3), seed)
    return Task(model, loss="squared-error"), (numbers(N, 4, seed=7), numbers(N, 3, seed=8))


def test_exact_for_one_linear_layer_with_the_gaussian_fisher():
    """C_b = I for every b, so that the Fisher matrix is I (x) mean of x x^T."""
    task, train = regression()
    problem = problem_of(task, train)
    curvature = KFAC(fisher="ggn")
    x = torch.cat([train[0], torch.ones(N, 1).double()], 1)
    want = torch.kron(torch.eye(3).double(), x.T @ x / N)
    near(curvature.fit(problem).dense(), want, 1e-12)
    inverse = CurvatureInverse(curvature, Spectral(damping=1e-2)).fit(problem)
    rows = next(iter(problem.rows()))
    damped = want + 1e-2 * torch.eye(15).double()
    near(inverse.apply(rows).flat(), torch.linalg.solve(damped, rows.flat().T).T, 1e-12)


def test_exact_where_inputs_and_output_gradients_are_independent():
    """Every input meets every residual: the empirical Fisher matrix is a Kronecker product."""
    x, residual = numbers(5, 4, seed=1), numbers(4, 3, seed=2)
    task, _ = regression()
    inputs = x.repeat_interleave(4, 0)
    with torch.no_grad():
        targets = task.model(inputs) - residual.repeat(5, 1)
    train = (inputs, targets)
    matrix, _ = dense(KFAC(fisher="empirical"), task, train)
    rows = factors_of(task, train, "", empirical(task))
    near(matrix, fisher(rows, 20), 1e-12)


def test_not_exact_where_they_depend_on_each_other():
    task, train = mlp()
    matrix, space = dense(KFAC(fisher="empirical"), task, train)
    flat = row_matrix(task, space, train)
    exact = block_diagonal(flat.T @ flat / N, space)
    assert float((matrix - exact).norm() / exact.norm()) > 0.1


# --- invariance ---------------------------------------------------------------------------------
@pytest.mark.parametrize("fisher_kind", ["sampled", "empirical", "ggn"])
@pytest.mark.parametrize("net", NET_NAMES)
def test_neither_batches_nor_order_show(net, fisher_kind):
    task, train = NETS[net]()
    want, _ = dense(KFAC(fisher=fisher_kind), task, train, batch=N)
    for batch in (1, 4):
        near(dense(KFAC(fisher=fisher_kind), task, train, batch=batch)[0], want, 1e-10)
    if fisher_kind != "sampled":  # labels are drawn by the place of an example in the data
        turned = dattri.take(train, torch.arange(N).flip(0))
        near(dense(KFAC(fisher=fisher_kind), task, turned)[0], want, 1e-10)


def test_draws_differ_by_number_and_by_seed_alone():
    task, train = mlp()
    one, _ = dense(KFAC(), task, train)
    again, _ = dense(KFAC(), task, train)
    other, _ = dense(KFAC(), task, train, seed=1)
    two, _ = dense(KFAC(draws=2), task, train)
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    assert not torch.allclose(one, two)


# --- uncovered blocks, refusals -----------------------------------------------------------------
def test_uncovered_blocks_are_listed_and_treated_as_asked(caplog):
    task, train = mlp()
    problem = problem_of(task, train)
    rows = next(iter(problem.rows()))
    found = {}
    for choice in ("diagonal", "identity", "drop"):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="dattri"):
            operator = KFAC(fisher="empirical", uncovered=choice).fit(problem)
        assert "curvature 'kfac': 1 blocks have no factors and" in caplog.text
        assert caplog.text.strip().endswith(": 2")
        inverse = Spectral(damping=0.5).solve_for(operator, problem.device)
        found[choice] = (operator.apply(rows), inverse.apply(rows))
    norm = rows.blocks["2"].flat()
    assert bool((found["drop"][0].blocks["2"].flat() == 0).all())
    assert bool((found["drop"][1].blocks["2"].flat() == 0).all())
    near(found["identity"][0].blocks["2"].flat(), norm, 1e-12)
    near(found["identity"][1].blocks["2"].flat(), norm / 1.5, 1e-12)
    for choice in found:
        near(found[choice][1].blocks["0"].flat(), found["diagonal"][1].blocks["0"].flat(), 1e-12)
    with pytest.raises(SpecError, match=r"1 blocks have no factors \(2\) and uncovered='error'"):
        KFAC(uncovered="error").fit(problem)


def test_dropped_blocks_give_nothing_to_the_scores():
    task, train = mlp()
    without = Task(task.model, parameters=["0.*", "3.*"])
    options = {"fisher": "empirical", "damping": 0.1}
    dropped = dattri.attribute(task, train, train, method="if-kfac", uncovered="drop", **options)
    left_out = dattri.attribute(without, train, train, method="if-kfac", **options)
    near(dropped.values, left_out.values, 1e-12)


def test_fields_are_checked():
    with pytest.raises(SpecError, match=r"draws: got 3 with fisher='ggn'"):
        KFAC(fisher="ggn", draws=3)
    for wrong in ({"fisher": "true"}, {"uncovered": "skip"}, {"approximation": "mean"}):
        with pytest.raises((SpecError, ValueError)):
            KFAC(**wrong)
    assert KFAC().needs == {"fisher-rows"}
    assert KFAC(fisher="empirical").needs == {"rows"}
    assert KFAC(fisher="ggn").needs == {"ggn-rows"}
    assert not KFAC().exact


def test_a_loss_that_gives_no_labels_is_refused_before_any_work():
    task, train = mlp()
    plain = Task(
        task.model, loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")
    )
    with pytest.raises(SpecError, match="rows of kind 'fisher'"):
        dattri.method("if-kfac").fit(plain, train)
    dattri.method("if-kfac", fisher="empirical").fit(plain, train)


def test_a_method_prints_and_is_its_spec():
    method = dattri.method("if-kfac", damping=1e-2, uncovered="drop")
    assert Method(**method.to_spec()) == method
