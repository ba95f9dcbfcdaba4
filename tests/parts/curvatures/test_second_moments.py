"""Curvatures that are second moments of rows, against dense float64 matrices."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dattri_parts.curvatures import second_moment
from dattri_parts.curvatures.fisher_information import Fisher
from dattri_parts.curvatures.gauss_newton import GaussNewton
from dattri_parts.curvatures.ggn import GGN
from dattri_parts.curvatures.leading_ggn import LeadingGGN
from dattri_parts.solvers.spectral import Spectral
from oracles.networks import (
    NETWORKS,
    dense_ggn,
    dense_second_moment,
    diagonal_blocks,
    network,
    problem_of,
    solved,
)
from oracles.toy_parts import FlatSketch
from torch import nn

from dattri_core import (
    BlockSpec,
    MemoryBudgetError,
    Rows,
    Space,
    SpecError,
    Task,
    batch_size,
    take,
)
from dattri_core.laws.oracles import gradients_of, output_hessian, place, row_matrix, singles
from dattri_core.outlook import outlook_before_fit, outlook_of
from dattri_core.stages import CurvatureInverse

CPU = torch.device("cpu")


def gap(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def vectors(space, count=4):
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(count, space.dim, generator=generator, dtype=torch.float64)
    return Rows.from_flat(space, flat, torch.arange(count) + 5)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_empirical_fisher_is_the_second_moment_of_gradients(name, batch, block):
    task, train = network(name)
    problem = problem_of(task, train, batch=batch)
    matrix = dense_second_moment(task, problem.space, train)
    if block:
        matrix = diagonal_blocks(matrix, problem.space)
    given, factored = vectors(problem.space), Rows.concatenate(list(problem.rows()))
    for curvature in (GaussNewton(block=block), Fisher(kind="empirical", block=block)):
        operator = curvature.fit(problem)
        assert gap(operator.dense(), matrix) < 1e-12
        for rows in (given, factored):
            product = operator.apply(rows)
            assert gap(product.flat(), rows.flat() @ matrix) < 1e-12
            assert torch.equal(product.index, rows.index)
        some = torch.tensor([6, 1, 1])
        chosen = row_matrix(task, problem.space, train)[some]
        mean = chosen.T @ chosen / 3
        mean = diagonal_blocks(mean, problem.space) if block else mean
        assert gap(operator.apply_on(given, some).flat(), given.flat() @ mean) < 1e-12
        assert operator.blockwise == block
        assert curvature.exact == (not block)


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_of_the_ggn_are_the_ggn(name):
    task, train = network(name)
    problem = problem_of(task, train)
    operator = GGN().fit(problem)
    flat = torch.cat([rows.flat() for rows in operator.rows()])
    matrix = dense_ggn(task, problem.space, train)
    assert gap(operator.weight * flat.T @ flat, matrix) < 1e-12
    assert (
        gap(operator.apply(vectors(problem.space)).flat(), vectors(problem.space).flat() @ matrix)
        < 1e-12
    )


def dense_leading(task, space, train, columns):
    """Return 1/n sum_i J_i^T C_i^(r) J_i from Jacobians by backward passes, ``[d, d]``."""
    total = torch.zeros(space.dim, space.dim, dtype=torch.float64)
    for example in singles(train):
        outputs = task.loss.forward(task.model, example)[0]
        jacobian = place(
            space,
            gradients_of(task, [partial(entry, task, example, e) for e in range(len(outputs))]),
        )
        values, vectors = torch.linalg.eigh(output_hessian(task, outputs[None], example))
        kept = vectors[:, -columns:] * values[-columns:].clamp_min(0).sqrt()
        half = kept.T @ jacobian
        total += half.T @ half
    return total / batch_size(train)


def entry(task, example, number):
    return task.loss.forward(task.model, example)[0, number]


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("name", NETWORKS)
def test_leading_columns_are_the_best_of_their_rank_and_all_of_them_the_ggn(name, batch):
    task, train = network(name)
    problem = problem_of(task, train, batch=batch)
    whole = dense_ggn(task, problem.space, train)
    for columns in (1, 2):
        operator = LeadingGGN(columns).fit(problem)
        wanted = dense_leading(task, problem.space, train, columns)
        assert gap(operator.dense(), wanted) < 1e-10
        assert len(Rows.concatenate(list(operator.rows()))) == 8 * columns
        given = vectors(problem.space)
        assert gap(operator.apply(given).flat(), given.flat() @ wanted) < 1e-10
        assert torch.linalg.eigvalsh(whole - wanted).min() > -1e-12  # never more than the GGN
        some = torch.tensor([6, 1, 1])
        chosen = dense_leading(task, problem.space, take(train, some), columns)
        assert gap(operator.apply_on(given, some).flat(), given.flat() @ chosen) < 1e-10
    assert gap(LeadingGGN(1).fit(problem).dense(), whole) > 0.01
    for columns in (2, 5):  # three classes have two directions; of others there is nothing
        assert gap(LeadingGGN(columns).fit(problem).dense(), whole) < 1e-10
    blocks = LeadingGGN(1, block=True).fit(problem)
    leading = dense_leading(task, problem.space, train, 1)
    assert gap(blocks.dense(), diagonal_blocks(leading, problem.space)) < 1e-10


def test_leading_columns_of_a_long_sequence_are_refused():
    model = nn.Sequential(nn.Embedding(130, 4), nn.Linear(4, 130))
    task = Task(model, loss="causal-lm")
    tokens = torch.arange(8).expand(3, 8)
    train = {"input": tokens, "labels": tokens}
    problem = problem_of(task, train)
    with pytest.raises(SpecError, match=r"1040 outputs.* up to 1024; use .*'fisher'"):
        LeadingGGN().fit(problem).dense()


def test_drawn_labels_come_to_the_ggn_as_their_number_grows():
    task, train = network("perceptron")
    problem = problem_of(task, train)
    matrix = dense_ggn(task, problem.space, train)
    gaps = [gap(Fisher(draws=draws).fit(problem).dense(), matrix) for draws in (1, 400)]
    assert gaps[1] < 0.15
    assert gaps[1] < gaps[0] / 4
    one, same = (Fisher(draws=2).fit(problem_of(task, train, batch=b)).dense() for b in (1, 5))
    assert gap(one, same) < 1e-12  # keyed by position, never by batch
    other = problem_of(*network("perceptron", seed=1))
    assert gap(Fisher().fit(other).dense(), Fisher().fit(problem).dense()) > 0.1


@pytest.mark.parametrize("block", [False, True])
def test_eigenvectors_of_small_blocks_serve_the_spectral_solver(block):
    task, train = network("reader")
    sketches = [] if block else [FlatSketch(7)]
    problem = problem_of(task, train, sketches=sketches)
    curvature = GaussNewton(block=block)
    assert "spectral" in curvature.gives(problem.space)
    operator = curvature.fit(problem)
    matrix = operator.dense()
    rows = Rows.concatenate(list(problem.rows()))
    inverse = Spectral(0.01).solve_for(operator, CPU)
    assert gap(inverse.apply(rows).flat(), solved(matrix, 0.01, rows.flat())) < 1e-10
    assert all(float(values.min()) >= 0 for values in operator.eigenvalues.values())


def wide(count):
    """Return a network of a wide and a narrow layer, and so many examples."""
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    inputs = torch.randn(count, 30, generator=generator, dtype=torch.float64)
    return Task(model), (inputs, torch.randint(0, 3, (count,), generator=generator))


@pytest.mark.parametrize("count", [1, 20, 62, 63, 90])
@pytest.mark.parametrize("draws", [1, 2])
def test_blocks_of_few_rows_are_decomposed_by_their_rows(count, draws):
    problem = problem_of(*wide(count), batch=7)
    curvature = Fisher(block=True, draws=draws) if draws > 1 else GaussNewton(block=True)
    operator, sizes = curvature.fit(problem), [248, 27]
    rows = count * draws
    kept = [rows if 4 * rows <= size else size for size in sizes]
    assert [values.shape[0] for values in operator.eigenvalues.values()] == kept
    assert [operator.basis.columns[n].shape for n in ("0", "2")] == list(
        zip(sizes, kept, strict=True)
    )
    assert operator.complete == (kept == sizes)
    assert operator.basis.nbytes == 8 * sum(a * b for a, b in zip(sizes, kept, strict=True))
    matrix, read = operator.dense(), Rows.concatenate(list(problem.rows()))
    for name, columns in operator.basis.columns.items():
        eye = torch.eye(columns.shape[1], dtype=torch.float64)
        assert gap(columns.mT @ columns, eye) < 1e-12
        start = problem.space.offsets[name]
        here = slice(start, start + len(columns))
        rebuilt = columns * operator.eigenvalues[name] @ columns.mT
        assert gap(rebuilt, matrix[here, here]) < 1e-12
    for given in (read, vectors(problem.space)):
        for damping in (1e-6, 0.01):
            want = solved(matrix, damping, given.flat())
            inverse = Spectral(damping).solve_for(operator, CPU)
            assert gap(inverse.apply(given).flat(), want) < 1e-6
            root = Spectral(damping).root_for(operator, CPU)
            assert gap(root.apply(root.apply(given)).flat(), want) < 1e-6


@pytest.mark.parametrize("count", [20, 90])
def test_before_the_fit_it_is_known_whether_few_rows_leave_a_basis(count):
    task, train = wide(count)
    problem = problem_of(task, train, sketches=[FlatSketch(250)])
    for curvature in (GaussNewton(block=True), Fisher(block=True), LeadingGGN(block=True)):
        stage = CurvatureInverse(curvature, Spectral(0.01))
        told = outlook_before_fit(stage, problem.space, problem)
        known = outlook_of(stage, stage.fit(problem), problem.space)
        assert told.splits == known.splits == (count == 90)
        assert told.spectral == known.spectral == (count == 90)


def test_the_room_for_few_rows_is_that_of_their_eigenvectors():
    needed = 16 * (248 * 20 + 27 * 27)
    GaussNewton(block=True).fit(problem_of(*wide(20), memory=needed)).basis
    with pytest.raises(MemoryBudgetError, match="the eigenvectors of its blocks"):
        GaussNewton(block=True).fit(problem_of(*wide(20), memory=needed - 1)).basis


def test_what_is_given_is_told_from_the_space():
    small = Space((BlockSpec("a", "outer", (3, 4)), BlockSpec("b", "dense", (5,))))
    large = Space((BlockSpec("a", "outer", (80, 90)),))
    single = Space((BlockSpec("a", "dense", (512,)),))
    plain = {"apply", "dense", "rows", "sampled"}
    assert GaussNewton(block=True).gives(small) == plain | {"spectral"}
    assert GaussNewton().gives(small) == plain  # one matrix over two blocks
    assert GaussNewton().gives(single) == plain | {"spectral"}
    assert GaussNewton(block=True).gives(large) == plain
    assert second_moment.LARGEST_SPECTRUM == 4096
    assert Fisher(block=True).gives(small) == GaussNewton(block=True).gives(small)


def test_what_cannot_be_done_is_said():
    problem = problem_of(*network("perceptron"), memory=2**12)
    for refused in (lambda o: o.dense(), lambda o: o.basis):
        with pytest.raises(MemoryBudgetError, match=r"needs .* may be used; use a solver"):
            refused(GaussNewton(block=True).fit(problem))
    with pytest.raises(SpecError, match="draws=2 with kind='empirical'"):
        Fisher(kind="empirical", draws=2)
    for wrong in ({"kind": "true"}, {"draws": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Fisher(**wrong)
    with pytest.raises(SpecError, match="curvature product: the spaces differ"):
        GaussNewton().fit(problem).apply(vectors(Space((BlockSpec("z", "dense", (3,)),))))
    assert Fisher().needs == {"fisher-rows"}
    assert Fisher(kind="empirical").needs == GaussNewton().needs == {"rows"}
    assert not Fisher().exact
    assert Fisher(kind="empirical").exact
    assert GGN().needs_for(frozenset({"rows"})) == {"ggn-rows"}
    assert GGN().needs_for(frozenset({"apply"})) == GGN().needs == {"ggn-product"}
