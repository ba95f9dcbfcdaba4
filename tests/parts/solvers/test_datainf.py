"""DataInf against its formula, densely in float64."""

from __future__ import annotations

import pytest
import torch
from dattri_parts.curvatures.fisher_information import Fisher
from dattri_parts.curvatures.gauss_newton import GaussNewton
from dattri_parts.curvatures.ggn import GGN
from dattri_parts.solvers.datainf import DataInf
from oracles.networks import NETWORKS, network, problem_of

from dattri_core import (
    Damping,
    MemoryBudgetError,
    NumericsError,
    Outlook,
    Rows,
    SpanBlock,
    SumBlock,
)
from dattri_core.laws.oracles import row_matrix

CPU = torch.device("cpu")


def gap(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def mean_of_inverses(gradients, damping, flat):
    """Return 1/n sum_i (g_i g_i^T + damping I)^-1 h by n dense solves."""
    eye = torch.eye(gradients.shape[1], dtype=torch.float64)
    found = [torch.linalg.solve(torch.outer(g, g) + damping * eye, flat.T).T for g in gradients]
    return torch.stack(found).mean(0)


def by_block(space, function):
    parts = []
    for spec in space:
        start = space.offsets[spec.name]
        parts.append(function(slice(start, start + spec.size)))
    return torch.cat(parts, 1)


def setting(name, n=8, **options):
    task, train = network(name, n)
    problem = problem_of(task, train, **options)
    rows = Rows.concatenate(list(problem_of(*network(name, 5, 9)).rows()))
    return problem, row_matrix(task, problem.space, train), rows


@pytest.mark.parametrize("memory", [2**28, 2**10])  # rows held, rows read again
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_its_formula_block_by_block(name, memory):
    problem, gradients, rows = setting(name, memory=memory)
    inverse = DataInf(0.03).solve_for(GaussNewton(block=True).fit(problem), CPU)
    assert inverse.stats["rows_held"] == (memory > 2**20)
    flat = rows.flat()
    want = by_block(problem.space, lambda at: mean_of_inverses(gradients[:, at], 0.03, flat[:, at]))
    answer = inverse.apply(rows)
    assert inverse.blockwise == bool(inverse.stats["rows_held"])
    assert gap(answer.flat(), want) < 1e-9
    assert gap(rows.inner(answer), flat @ want.T) < 1e-9
    assert torch.equal(answer.index, rows.index)
    again = inverse.with_damping(Damping(2.0)).apply(rows).flat()
    want = by_block(problem.space, lambda at: mean_of_inverses(gradients[:, at], 2.0, flat[:, at]))
    assert gap(again, want) < 1e-9


@pytest.mark.parametrize("memory", [2**28, 2**10])
@pytest.mark.parametrize("name", NETWORKS)
def test_dampings_share_one_pass(name, memory):
    """Every block of every damping from one reading of the train set, or none where rows stay."""
    problem, _, rows = setting(name, memory=memory)
    first = DataInf(0.03).solve_for(GaussNewton(block=True).fit(problem), CPU)
    inverses = [first, *(first.with_damping(Damping(value)) for value in (0.2, 5.0))]
    before = problem.examples.reads
    answers = first.apply_each(rows, inverses)
    looked = 0 if first.stats["rows_held"] else problem.n_train + 1  # at one for its size
    assert problem.examples.reads - before == looked
    for inverse, answer in zip(inverses, answers, strict=True):
        alone = inverse.apply(rows)
        assert gap(answer.flat(), alone.flat()) < 1e-12
        assert torch.equal(answer.index, rows.index)


@pytest.mark.parametrize("memory", [2**28, 2**10])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("curvature", [GaussNewton(block=True), GaussNewton(), GGN()])
def test_it_is_known_before_the_fit_whether_rows_stay(curvature, name, memory):
    problem, _, _ = setting(name, memory=memory)
    operator = curvature.fit(problem)
    block = getattr(curvature, "block", False)
    told = DataInf().foresee(operator, Outlook(blockwise=block))
    fitted = DataInf().solve_for(curvature.fit(problem), CPU)
    assert told.blockwise == fitted.blockwise
    assert (told.forms, told.base) == (fitted.forms, fitted.base)
    if fitted.forms:
        assert told.beside == fitted.beside == 1
    assert told.held == (0 if fitted.forms else pytest.approx(fitted.held, rel=0.1))


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_its_formula_on_whole_rows(name):
    problem, gradients, rows = setting(name)
    inverse = DataInf(0.5).solve_for(Fisher(kind="empirical").fit(problem), CPU)
    assert not inverse.blockwise
    want = mean_of_inverses(gradients, 0.5, rows.flat())
    assert gap(inverse.apply(rows).flat(), want) < 1e-9


def test_the_default_damping_is_that_of_the_paper():
    problem, gradients, rows = setting("perceptron")
    inverse = DataInf().solve_for(GaussNewton(block=True).fit(problem), CPU)

    def formula(at):
        mine = gradients[:, at]
        damping = 0.1 * float(mine.square().sum()) / mine.numel()
        return mean_of_inverses(mine, damping, rows.flat()[:, at])

    assert gap(inverse.apply(rows).flat(), by_block(problem.space, formula)) < 1e-9
    dampings = [
        0.1 * float(gradients[:, o : o + s.size].square().mean())
        for s, o in zip(problem.space, problem.space.offsets.values(), strict=True)
    ]
    assert inverse.stats["damping_maximum"] == pytest.approx(max(dampings))
    assert inverse.stats["damping_minimum"] == pytest.approx(min(dampings))


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("memory", [2**28, 2**10])
def test_batches_do_not_show(batch, memory):
    problem, _, rows = setting("reader", batch=batch, memory=memory)
    whole, _, _ = setting("reader", batch=3)
    curvature = GaussNewton(block=True)
    got = DataInf().solve_for(curvature.fit(problem), CPU).apply(rows).flat()
    want = DataInf().solve_for(curvature.fit(whole), CPU).apply(rows).flat()
    assert gap(got, want) < 1e-12


def test_rows_of_another_weight_give_the_same_as_scaled_ones():
    problem, _, rows = setting("perceptron")
    operator = GGN().fit(problem)
    all_rows = Rows.concatenate(list(operator.rows()))
    count = len(all_rows)  # more than examples: 1 / n is not 1 / N
    gradients = all_rows.flat() * (count / problem.n_train) ** 0.5
    want = mean_of_inverses(gradients, 0.1, rows.flat())
    assert gap(DataInf(0.1).solve_for(operator, CPU).apply(rows).flat(), want) < 1e-9


def test_one_example_is_inverted_exactly():
    problem, gradients, rows = setting("perceptron", n=1, batch=1)
    matrix = gradients.T @ gradients + 0.2 * torch.eye(gradients.shape[1]).double()
    want = torch.linalg.solve(matrix, rows.flat().T).T
    inverse = DataInf(0.2).solve_for(GaussNewton().fit(problem), CPU)
    assert gap(inverse.apply(rows).flat(), want) < 1e-9


@pytest.mark.parametrize("queries", [1, 4])
def test_no_answer_is_formed_where_rows_are_held(queries):
    """However few are asked for at once, as slabs of a small budget do."""
    problem, _, rows = setting("perceptron", n=40)
    some = rows.take(slice(0, queries))
    answer = DataInf(0.1).solve_for(GaussNewton(block=True).fit(problem), CPU).apply(some)
    for block in answer.blocks.values():
        assert isinstance(block, SumBlock)
        assert isinstance(block.parts[1], SpanBlock)
        assert len(block.parts[1].base) == 40


def test_what_cannot_be_done_is_said():
    problem, _, _ = setting("perceptron")
    with pytest.raises(NumericsError, match="damping is 0"):
        DataInf(0.0).solve_for(GaussNewton().fit(problem), CPU)
    with pytest.raises(MemoryBudgetError, match=r"matrix needs .* may be used"):
        GaussNewton().fit(setting("perceptron", memory=2**10)[0]).dense()
    assert DataInf.needs == {"rows"}
    assert not DataInf.exact
    assert DataInf() == DataInf(damping={"relative": 0.1})
