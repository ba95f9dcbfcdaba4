"""The diagonal Fisher against the diagonal of dense matrices."""

import pytest
import torch
from dattri_parts.curvatures.diagonal import Diagonal
from dattri_parts.solvers.spectral import Spectral
from oracles.kronecker import problem_of
from oracles.kronecker_nets import NETS, N, labels, mlp, numbers, seeded
from oracles.toy_parts import FlatSketch
from torch import nn

import dattri_core as dattri
from dattri_core import Method, SpecError, Task
from dattri_core.laws.oracles import ggn, row_matrix
from dattri_core.testing import PeakMemory


def near(got, want, tolerance=1e-12):
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("net", sorted(NETS))
def test_it_is_the_mean_square_of_the_rows(net):
    task, train = NETS[net]()
    problem = problem_of(task, train)
    want = torch.diag(row_matrix(task, problem.space, train).square().mean(0))
    near(Diagonal(fisher="empirical").fit(problem).dense(), want)


@pytest.mark.parametrize("net", sorted(NETS))
def test_of_ggn_rows_it_is_the_diagonal_of_the_ggn_exactly(net):
    task, train = NETS[net]()
    problem = problem_of(task, train)
    want = torch.diag(ggn(task, problem.space, train).diagonal())
    near(Diagonal(fisher="ggn").fit(problem).dense(), want, 1e-10)


def test_many_draws_of_labels_come_to_the_ggn():
    task, train = mlp()
    problem = problem_of(task, train)
    want = ggn(task, problem.space, train).diagonal()
    errors = {
        draws: float((Diagonal(draws=draws).fit(problem).dense().diagonal() - want).norm())
        for draws in (1, 100)
    }
    assert errors[100] < 0.1 * float(want.norm())
    assert errors[100] < errors[1]


def test_the_inverse_divides_by_the_damped_diagonal():
    task, train = mlp()
    problem = problem_of(task, train)
    operator = Diagonal(fisher="empirical").fit(problem)
    inverse = Spectral(damping=0.3).solve_for(operator, problem.device)
    rows = next(iter(problem.rows()))
    near(inverse.apply(rows).flat(), rows.flat() / (operator.dense().diagonal() + 0.3))


@pytest.mark.parametrize("batch", [1, 4, N])
def test_batches_do_not_show(batch):
    task, train = mlp()
    want = Diagonal().fit(problem_of(task, train, batch=3)).dense()
    near(Diagonal().fit(problem_of(task, train, batch=batch)).dense(), want)


def test_squares_of_a_wide_embedding_take_no_row():
    model = seeded(lambda: nn.Sequential(nn.Embedding(20_000, 4), nn.Flatten(), nn.Linear(12, 3)))
    task = Task(model, parameters="0.*")
    train = (labels(20_000, 64, 3, seed=1), labels(3, 64, seed=2))
    problem = problem_of(task, train, batch=64)
    with PeakMemory() as memory:
        operator = Diagonal(fisher="empirical").fit(problem)
    assert memory.peak < 8 * 20_000 * 4 * 8  # a few weights, where 64 rows are 64 of them
    rows = torch.cat([rows.flat() for rows in problem.rows()])
    near(operator.eigenvalues["0.weight"].flatten(), rows.square().mean(0))


def test_it_takes_any_space_and_any_source():
    task, train = mlp()
    options = {"fisher": "empirical", "damping": 0.1}
    mine = dattri.attribute(task, train, train, method="if-diagonal", **options)
    other = dattri.attribute(
        task, train, train, method="if-diagonal", source="functional", **options
    )
    near(other.values, mine.values, 1e-10)
    sketched = Method(
        projector=FlatSketch(6),
        inverse_hessian={"curvature": "diagonal", "solver": "spectral"},
    )
    assert sketched.attribute(task, train, train).values.isfinite().all()


def test_fields_are_checked():
    with pytest.raises(SpecError, match=r"draws: got 2 with fisher='empirical'"):
        Diagonal(fisher="empirical", draws=2)
    assert Diagonal().needs == {"fisher-rows"}
    assert not Diagonal.exact
    assert numbers(1, seed=0).dtype == torch.float64
