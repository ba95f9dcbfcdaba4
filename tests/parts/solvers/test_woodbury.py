"""The dual inverse against dense solves in float64."""

from __future__ import annotations

import pytest
import torch
from dattri_parts.curvatures.fisher_information import Fisher
from dattri_parts.curvatures.gauss_newton import GaussNewton
from dattri_parts.curvatures.ggn import GGN
from dattri_parts.solvers.woodbury import Woodbury
from oracles.networks import (
    NETWORKS,
    dense_ggn,
    dense_second_moment,
    diagonal_blocks,
    network,
    problem_of,
    solved,
)

from dattri_core import Rows

CPU = torch.device("cpu")


def queries(problem, task, count=5, seed=9):
    """Return factored rows that are no train rows."""
    kind = {"Sequential": "perceptron", "Reader": "reader"}[type(task.model).__name__]
    if kind == "perceptron" and len(task.model) == 4 and task.model[0].weight.dim() == 4:
        kind = "images"
    _, test = network(kind, count, seed)
    return Rows.concatenate(list(problem_of(task, test).rows()))


def gap(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_equals_a_dense_solve_of_the_named_curvature(name, damping):
    task, train = network(name)
    problem = problem_of(task, train)
    rows = queries(problem, task)
    cases = {
        GGN(): dense_ggn(task, problem.space, train),
        GaussNewton(): dense_second_moment(task, problem.space, train),
        Fisher(kind="empirical"): dense_second_moment(task, problem.space, train),
        Fisher(draws=3): Fisher(draws=3).fit(problem).dense(),
    }
    for curvature, matrix in cases.items():
        inverse = Woodbury(damping).solve_for(curvature.fit(problem), CPU)
        answer = inverse.apply(rows)
        assert gap(answer.flat(), solved(matrix, damping, rows.flat())) < 1e-8, curvature
        assert torch.equal(answer.index, rows.index)
        assert inverse.stats["damping"] == damping
        train_rows = Rows.concatenate(list(problem.rows()))
        scores = train_rows.inner(answer)
        want = train_rows.flat() @ solved(matrix, damping, rows.flat()).T
        assert gap(scores, want) < 1e-8, curvature


@pytest.mark.parametrize("name", NETWORKS)
def test_blockwise_equals_a_dense_solve_of_the_diagonal_blocks(name):
    task, train = network(name)
    problem = problem_of(task, train)
    rows = queries(problem, task)
    matrix = diagonal_blocks(dense_second_moment(task, problem.space, train), problem.space)
    for curvature in (GaussNewton(block=True), Fisher(kind="empirical", block=True)):
        inverse = Woodbury(0.01).solve_for(curvature.fit(problem), CPU)
        assert inverse.blockwise
        assert gap(inverse.apply(rows).flat(), solved(matrix, 0.01, rows.flat())) < 1e-8
