"""Conjugate gradients against dense solves in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from dattri_parts.solvers.cg import CG
from dattri_parts.solvers.cholesky import Cholesky
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.dense import MatrixOperator, factored, rows_of, symmetric

from dattri_core import ConvergenceWarning, Damping, NumericsError, Rows, SpecError

CPU = torch.device("cpu")


def solved(matrix, damping, flat):
    shifted = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    return torch.linalg.solve(shifted, flat.double().mT).mT


def gap(found, expected):
    return float((found - expected).norm() / expected.norm())


def reference(matrix, b, iterations):
    """Return the textbook iterates of one system, one after each step."""
    x, r = torch.zeros_like(b), b.clone()
    p, iterates = r.clone(), []
    for _ in range(iterations):
        product = matrix @ p
        alpha = (r @ r) / (p @ product)
        x = x + alpha * p
        after = r - alpha * product
        p = after + (after @ after) / (r @ r) * p
        r = after
        iterates.append(x)
    return iterates


def system(size=8, least=0.1, most=5.0, seed=0, count=3):
    torch.manual_seed(seed)
    matrix = symmetric(torch.linspace(least, most, size), seed)
    return matrix, rows_of(torch.randn(count, size, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.0, 10.0), min_size=1, max_size=12),
    st.integers(0, 5),
    st.sampled_from([0.05, 0.5]),
    st.integers(0, 99),
)
def test_at_convergence_equals_a_dense_solve_and_cholesky(eigenvalues, count, damping, seed):
    matrix = symmetric(torch.tensor(eigenvalues).double(), seed)
    torch.manual_seed(seed)
    rows = rows_of(torch.randn(count, len(matrix), dtype=torch.float64))
    operator = MatrixOperator(matrix)
    inverse = CG(damping=damping, tolerance=1e-12).solve_for(operator, CPU)
    answer = inverse.apply(rows)
    torch.testing.assert_close(
        answer.flat(), solved(matrix, damping, rows.flat()), rtol=1e-9, atol=1e-9
    )
    explicit = Cholesky(damping=damping).solve_for(operator, CPU).apply(rows)
    torch.testing.assert_close(answer.flat(), explicit.flat(), rtol=1e-8, atol=1e-9)
    assert torch.equal(answer.index, rows.index)
    assert torch.equal(answer.aux["a"], rows.aux["a"])
    assert inverse.stats["converged"] == inverse.stats["rows"] == count
    assert inverse.stats["residual"] <= 1e-12
    assert inverse.stats["iterations"] == operator.products
    assert inverse.stats["damping"] == damping


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_each_row_follows_the_textbook_iterates(iterations):
    matrix, rows = system(size=9)
    operator = MatrixOperator(matrix)
    solver = CG(damping=0.2, maximum_iterations=iterations, tolerance=0.0)
    inverse = solver.solve_for(operator, CPU)
    with pytest.warns(ConvergenceWarning):
        found = inverse.apply(rows).flat()
    shifted = matrix + 0.2 * torch.eye(9).double()
    residual = 0.0
    for row, b in enumerate(rows.flat()):
        expected = reference(shifted, b, iterations)[-1]
        torch.testing.assert_close(found[row], expected, rtol=1e-11, atol=1e-11)
        residual = max(residual, float((b - shifted @ expected).norm() / b.norm()))
    # As many products as iterations: none is hidden in a last check.
    assert (operator.products, operator.vectors) == (iterations, 3 * iterations)
    assert inverse.stats["residual"] == pytest.approx(residual, rel=1e-9)


def test_rows_that_miss_the_tolerance_are_counted_and_warned_about():
    matrix, rows = system(size=20, least=1e-4, most=100, count=4)
    easy = torch.linalg.eigh(matrix).eigenvectors[:, 3]  # solved in one step
    flat = rows.flat().clone()
    flat[1] = easy
    inverse = CG(damping=0.0, maximum_iterations=3).solve_for(MatrixOperator(matrix), CPU)
    with pytest.warns(ConvergenceWarning, match=r"3 of 4 rows.*1e-05 in 3 iterations.*maximum_it"):
        answer = inverse.apply(rows_of(flat))
    assert inverse.stats["converged"] == 1
    assert gap(answer.flat()[1], solved(matrix, 0.0, easy[None])[0]) < 1e-9


def test_solved_rows_leave_the_work_and_change_no_more():
    matrix, rows = system(size=10)
    basis = torch.linalg.eigh(matrix).eigenvectors
    flat = rows.flat().clone()
    flat[1] = basis[:, 0]  # one step
    flat[0] = basis[:, 1] + basis[:, 2]  # two steps
    operator = MatrixOperator(matrix)
    inverse = CG(damping=0.1, tolerance=1e-11).solve_for(operator, CPU)
    answer = inverse.apply(rows_of(flat))
    total = int(inverse.stats["iterations"])
    assert total > 5
    assert operator.vectors == 1 + 2 + total
    torch.testing.assert_close(answer.flat(), solved(matrix, 0.1, flat), rtol=1e-9, atol=1e-9)


def test_a_zero_row_gives_zero_and_costs_nothing():
    matrix, rows = system()
    flat = rows.flat().clone()
    flat[1] = 0
    operator = MatrixOperator(matrix)
    inverse = CG(tolerance=1e-11).solve_for(operator, CPU)
    answer = inverse.apply(rows_of(flat)).flat()
    assert torch.equal(answer[1], torch.zeros(8).double())
    assert gap(answer, solved(matrix, 1e-3, flat)) < 1e-9
    alone = MatrixOperator(matrix)
    zero = CG().solve_for(alone, CPU)
    assert torch.equal(zero.apply(rows_of(torch.zeros(2, 8))).flat(), torch.zeros(2, 8))
    assert (alone.products, zero.stats["converged"], zero.stats["residual"]) == (0, 2, 0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_scale_of_a_row_does_not_matter_in_single_precision(scale):
    # Squares of these would underflow or overflow in float32.
    matrix, rows = system()
    small = rows_of((rows.flat() * scale).float())
    inverse = CG(damping=0.1, tolerance=1e-6).solve_for(MatrixOperator(matrix, torch.float32), CPU)
    answer = inverse.apply(small)
    assert answer.dtype == torch.float32
    assert gap(answer.flat().double() / scale, solved(matrix, 0.1, rows.flat())) < 1e-5
    assert inverse.stats["converged"] == 3


def test_negative_curvature_keeps_the_last_iterate():
    matrix = symmetric(torch.tensor([-2.0, 0.5, 1.0, 2.0, 3.0, 4.0]), 7)
    values, basis = torch.linalg.eigh(matrix)
    flat = torch.stack(
        [
            basis[:, 0],  # negative at the first step: the row itself
            basis[:, 1] + basis[:, 4],  # never meets it
            basis[:, 5] + 0.3 * basis[:, 4] + 0.1 * basis[:, 0],  # positive first, negative later
        ]
    )
    operator = MatrixOperator(matrix)
    inverse = CG(damping=0.1, tolerance=1e-10).solve_for(operator, CPU)
    with pytest.warns(
        ConvergenceWarning, match=r"2 of 3 rows met negative curvature.*'ggn'"
    ) as seen:
        answer = inverse.apply(rows_of(flat)).flat()
    assert len(seen) == 1  # stopped rows are not reported as slow ones too
    shifted = matrix + 0.1 * torch.eye(6).double()
    torch.testing.assert_close(answer[0], flat[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(answer[1], solved(matrix, 0.1, flat)[1], rtol=1e-9, atol=1e-9)
    iterates, r, p, x = [], flat[2], flat[2], torch.zeros(6).double()
    while p @ shifted @ p > 0:
        alpha = (r @ r) / (p @ shifted @ p)
        x, after = x + alpha * p, r - alpha * shifted @ p
        p, r = after + (after @ after) / (r @ r) * p, after
        iterates.append(x)
    assert 1 <= len(iterates) < 6
    torch.testing.assert_close(answer[2], iterates[-1], rtol=1e-9, atol=1e-9)
    assert inverse.stats["negative_curvature"] == 2
    assert inverse.stats["converged"] == 1
    assert values[0] + 0.1 < 0


def test_singular_without_damping_stops_instead_of_exploding():
    matrix = symmetric(torch.tensor([0.0, 0.0, 1.0, 2.0]), 3)
    basis = torch.linalg.eigh(matrix).eigenvectors
    inverse = CG(damping=0.0).solve_for(MatrixOperator(matrix), CPU)
    with pytest.warns(ConvergenceWarning, match="negative curvature"):
        answer = inverse.apply(rows_of((basis[:, 0] + basis[:, 3])[None])).flat()
    assert float(answer.norm()) < 10


def test_with_damping_uses_the_same_operator_and_equals_a_fresh_solve():
    matrix, rows = system()
    operator = MatrixOperator(matrix)
    first = CG(damping=0.1, tolerance=1e-12).solve_for(operator, CPU)
    moved = first.with_damping(Damping(2.0))
    assert operator.products == 0
    fresh = CG(damping=2.0, tolerance=1e-12).solve_for(operator, CPU)
    assert torch.equal(moved.apply(rows).flat(), fresh.apply(rows).flat())
    assert gap(moved.apply(rows).flat(), solved(matrix, 2.0, rows.flat())) < 1e-11
    assert moved.stats["damping"] == 2.0
    assert gap(first.apply(rows).flat(), solved(matrix, 0.1, rows.flat())) < 1e-10


def test_relative_damping_estimates_the_mean_eigenvalue_once():
    # On a diagonal, random signs give the trace exactly.
    matrix = torch.diag(torch.linspace(1, 5, 9).double())
    operator = MatrixOperator(matrix)
    inverse = CG(damping={"relative": 0.5}, tolerance=1e-12).solve_for(operator, CPU)
    rows = rows_of(torch.randn(2, 9, dtype=torch.float64))
    assert gap(inverse.apply(rows).flat(), solved(matrix, 1.5, rows.flat())) < 1e-11
    assert inverse.stats["damping"] == pytest.approx(1.5, rel=1e-12)
    before, iterations = operator.products, int(inverse.stats["iterations"])
    moved = inverse.with_damping(Damping(0.25, relative=True))
    moved.apply(rows)
    assert operator.products == before + int(moved.stats["iterations"])
    assert before == iterations + 1
    assert moved.stats["damping"] == pytest.approx(0.75, rel=1e-12)


def test_relative_damping_of_a_full_matrix_is_near_the_trace():
    matrix, rows = system(size=40)
    inverse = CG(damping={"relative": 1.0}).solve_for(MatrixOperator(matrix), CPU)
    inverse.apply(rows)
    truth = float(matrix.diagonal().mean())
    # Variance of one probe is 2 |off-diagonal|^2 / d^2; four standard errors of 32.
    off = matrix - torch.diag(matrix.diagonal())
    assert abs(inverse.stats["damping"] - truth) < 4 * float(off.norm()) / 40 * (2 / 32) ** 0.5


def test_memory_groups_rows_without_changing_the_answer():
    matrix, rows = system(size=8, count=5)
    whole = MatrixOperator(matrix)
    tight = MatrixOperator(matrix, memory=6 * 8 * 8 * 2)  # two rows at a time
    solver = CG(damping=0.1, tolerance=1e-12)
    one, other = solver.solve_for(whole, CPU), solver.solve_for(tight, CPU)
    torch.testing.assert_close(one.apply(rows).flat(), other.apply(rows).flat(), rtol=1e-11, atol=0)
    assert other.stats["converged"] == other.stats["rows"] == 5
    assert tight.products > 2 * whole.products
    assert tight.vectors == whole.vectors


@pytest.mark.parametrize("slice_bytes", [1, 100])
def test_slices_of_systems_do_not_change_the_answer(slice_bytes, monkeypatch):
    matrix, rows = system(size=9, count=5)
    rows.flat()[2] = torch.linalg.eigh(matrix).eigenvectors[:, 0]
    solver = CG(damping=0.1, tolerance=1e-12)
    whole = solver.solve_for(MatrixOperator(matrix), CPU).apply(rows).flat()
    monkeypatch.setattr("dattri_parts.solvers.rowwise.SLICE_BYTES", slice_bytes)
    sliced = solver.solve_for(MatrixOperator(matrix), CPU).apply(rows).flat()
    torch.testing.assert_close(sliced, whole, rtol=1e-12, atol=1e-14)


def test_right_hand_sides_are_not_changed_and_may_be_factors():
    matrix, rows = system(size=8)
    before = rows.flat().clone()
    solver = CG(damping=0.1, tolerance=1e-12)
    expected = solved(matrix, 0.1, before)
    assert gap(solver.solve_for(MatrixOperator(matrix), CPU).apply(rows).flat(), expected) < 1e-10
    assert torch.equal(rows.flat(), before)
    parts = factored(rows)
    assert gap(solver.solve_for(MatrixOperator(matrix), CPU).apply(parts).flat(), expected) < 1e-10


def test_an_operator_that_returns_its_argument_is_not_corrupted():
    class Same(MatrixOperator):
        def apply(self, rows):
            self.products += 1
            return rows

    inverse = CG(damping=1.0, tolerance=1e-12).solve_for(Same(torch.eye(6).double()), CPU)
    rows = rows_of(torch.randn(2, 6, dtype=torch.float64))
    torch.testing.assert_close(inverse.apply(rows).flat(), rows.flat() / 2, rtol=1e-14, atol=0)


def test_half_precision_rows_are_solved_in_single():
    matrix, rows = system()
    narrow = rows.to(dtype=torch.bfloat16)
    operator = MatrixOperator(matrix, dtype=torch.float32)
    answer = CG(damping=0.5, tolerance=1e-6).solve_for(operator, CPU).apply(narrow)
    assert answer.dtype == torch.bfloat16
    # Within the rounding of the result, 2^-9 of its largest entry.
    expected = solved(matrix, 0.5, narrow.flat().double())
    assert float((answer.flat().double() - expected).abs().max()) < 2**-8 * float(
        expected.abs().max()
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad):
    matrix, rows = system()
    flat = rows.flat().clone()
    flat[0, 0] = bad
    with pytest.raises(NumericsError, match="right-hand side is not finite"):
        CG().solve_for(MatrixOperator(matrix), CPU).apply(rows_of(flat))
    matrix[0, 0] = bad
    with pytest.raises(NumericsError, match="curvature product is not finite"):
        CG().solve_for(MatrixOperator(matrix), CPU).apply(rows)


def test_stats_tell_of_the_last_rows():
    matrix, rows = system()
    inverse = CG(tolerance=1e-10).solve_for(MatrixOperator(matrix), CPU)
    assert inverse.stats == {}
    inverse.apply(rows)
    assert inverse.stats["rows"] == 3
    inverse.apply(rows.take(slice(0, 1)))
    assert inverse.stats["rows"] == inverse.stats["converged"] == 1


def test_a_converged_run_does_not_warn():
    matrix, rows = system()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CG().solve_for(MatrixOperator(matrix), CPU).apply(rows)


def test_other_spaces_are_refused():
    inverse = CG().solve_for(MatrixOperator(torch.eye(4).double()), CPU)
    with pytest.raises(SpecError, match="inverse Hessian: the spaces"):
        inverse.apply(rows_of(torch.zeros(1, 5)))


def test_declared_facts_and_fields():
    assert CG.needs == {"apply"}
    assert CG() == CG(damping=1e-3, maximum_iterations=100, tolerance=1e-5)
    assert CG(damping={"relative": 0.1}).damping == Damping(0.1, relative=True)
    for wrong in ({"maximum_iterations": 0}, {"tolerance": -1.0}, {"damping": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            CG(**wrong)
    assert isinstance(rows_of(torch.zeros(1, 4)), Rows)
