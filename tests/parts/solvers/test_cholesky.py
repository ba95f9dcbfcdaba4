"""The explicit inverse against dense solves in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from dattri_parts.solvers import cholesky as module
from dattri_parts.solvers import factor
from dattri_parts.solvers.cholesky import Cholesky
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.dense import MatrixOperator, factored, matrix_space, rows_of, symmetric

from dattri_core import BlockSpec, Damping, MemoryBudgetError, NumericsError, Space, SpecError

CPU = torch.device("cpu")


def solved(matrix, damping, flat):
    shifted = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    return torch.linalg.solve(shifted, flat.double().mT).mT


def gap(found, expected):
    return float((found - expected).norm() / expected.norm())


@st.composite
def systems(draw, least=-2.0):
    """Return eigenvalues off zero after damping, a damping, zero rows, and a seed."""
    size = draw(st.integers(1, 12))
    value = st.floats(least, 5.0).filter(lambda mu: abs(mu + 0.25) > 1e-2)
    eigenvalues = torch.tensor(draw(st.lists(value, min_size=size, max_size=size))).double()
    return symmetric(eigenvalues, draw(st.integers(0, 99))), draw(st.integers(0, 3))


def with_zero_rows(matrix, count):
    """Return the matrix with rows and columns of zeros spread through it."""
    size = len(matrix) + count
    keep = torch.ones(size, dtype=torch.bool)
    keep[torch.arange(count) * 2 % size] = False
    live = keep.nonzero().squeeze(1)[: len(matrix)]
    wide = torch.zeros(size, size, dtype=torch.float64)
    wide[live[:, None], live] = matrix[: len(live), : len(live)]
    return wide


@settings(max_examples=60, deadline=None)
@given(systems(), st.integers(0, 4))
def test_equals_a_dense_solve_definite_or_not(system, count):
    matrix, zeros = system
    matrix = with_zero_rows(matrix, zeros)
    flat = torch.randn(count, len(matrix), dtype=torch.float64)
    negative = int((torch.linalg.eigvalsh(matrix) + 0.25 < 0).sum())
    operator = MatrixOperator(matrix)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inverse = Cholesky(damping=0.25).solve_for(operator, CPU)
    rows = rows_of(flat)
    answer = inverse.apply(rows)
    torch.testing.assert_close(answer.flat(), solved(matrix, 0.25, flat), rtol=1e-9, atol=1e-9)
    assert answer.space == rows.space
    assert torch.equal(answer.index, rows.index)
    assert torch.equal(answer.aux["a"], rows.aux["a"])
    assert inverse.stats["negative_eigenvalues"] == negative
    assert inverse.stats["damping"] == 0.25
    assert inverse.stats["dimension"] == len(matrix)
    assert len([w for w in caught if w.category is RuntimeWarning]) == bool(negative)
    # Written down once, whatever is asked afterwards.
    assert (operator.dense_calls, operator.products) == (1, 0)


def test_indefinite_reports_the_smallest_eigenvalue_and_warns_with_the_cure():
    matrix = symmetric(torch.tensor([-1.5, -0.7, 0.2, 3.0], dtype=torch.float64), 1)
    with pytest.warns(RuntimeWarning, match=r"2 of 4 eigenvalues.*-1.5.*'ggn'"):
        inverse = Cholesky(damping=0.1).solve_for(MatrixOperator(matrix), CPU)
    assert inverse.stats["minimum_eigenvalue"] == pytest.approx(-1.5, abs=1e-12)
    assert inverse.stats["condition"] == pytest.approx(3.1 / 0.3, rel=1e-9)


def test_condition_of_a_definite_matrix_is_estimated():
    matrix = symmetric(torch.linspace(0.01, 20, 30), 2)
    inverse = Cholesky(damping=0.0).solve_for(MatrixOperator(matrix), CPU)
    assert inverse.stats["condition"] == pytest.approx(2000, rel=0.2)


@settings(max_examples=25, deadline=None)
@given(systems(), st.sampled_from([0.25, 1.0, 4.0]))
@pytest.mark.filterwarnings("ignore:solver 'cholesky'")
def test_with_damping_equals_a_fresh_solve_without_data(system, damping):
    matrix = with_zero_rows(*system)
    operator = MatrixOperator(matrix)
    rows = rows_of(torch.randn(3, len(matrix), dtype=torch.float64))
    try:
        fresh = Cholesky(damping=damping).solve_for(operator, CPU)
    except NumericsError:
        return  # an eigenvalue sits on -damping
    first = Cholesky(damping=0.25).solve_for(operator, CPU)
    calls = operator.dense_calls
    moved = first.with_damping(Damping(damping))
    assert operator.dense_calls == calls
    torch.testing.assert_close(
        moved.apply(rows).flat(), fresh.apply(rows).flat(), rtol=1e-9, atol=1e-9
    )
    assert moved.stats["damping"] == damping
    # The first one still answers with its own damping.
    torch.testing.assert_close(
        first.apply(rows).flat(), solved(matrix, 0.25, rows.flat()), rtol=1e-8, atol=1e-8
    )


def test_relative_damping_multiplies_the_mean_eigenvalue_of_all_coordinates():
    matrix = with_zero_rows(symmetric(torch.tensor([1.0, 2.0, 6.0]), 3), 3)
    inverse = Cholesky(damping={"relative": 0.5}).solve_for(MatrixOperator(matrix), CPU)
    assert inverse.stats["damping"] == pytest.approx(0.5 * 9 / 6, rel=1e-12)
    assert inverse.stats["zero_rows"] == 3
    rows = rows_of(torch.randn(2, 6, dtype=torch.float64))
    assert gap(inverse.apply(rows).flat(), solved(matrix, 0.75, rows.flat())) < 1e-12


def test_relative_damping_of_a_curvature_without_positive_mean_is_refused():
    matrix = symmetric(torch.tensor([-3.0, 1.0]), 0)
    with pytest.raises(NumericsError, match=r"mean eigenvalue -1.*absolute damping"):
        Cholesky(damping={"relative": 0.1}).solve_for(MatrixOperator(matrix), CPU)


@pytest.mark.filterwarnings("ignore:solver 'cholesky'")
@pytest.mark.parametrize(
    ("eigenvalues", "zeros", "damping"),
    [
        ([0.0, 1.0, 2.0], 0, 0.0),  # singular
        ([1e-17, 1.0, 2.0], 0, 0.0),
        ([-0.5, 1.0, 2.0], 0, 0.5),  # an eigenvalue on -damping
        ([1.0, 2.0], 2, 0.0),  # zero rows that nothing damps
        ([], 3, 0.0),  # nothing but zero rows
    ],
)
def test_singular_is_refused_with_the_cure(eigenvalues, zeros, damping):
    matrix = with_zero_rows(symmetric(torch.tensor(eigenvalues).double(), 0), zeros)
    with pytest.raises(NumericsError, match=r"singular.*give a damping above.*'ggn'"):
        Cholesky(damping=damping).solve_for(MatrixOperator(matrix), CPU)


def test_singular_is_measured_against_the_precision_of_the_operator():
    # 1e-9 of the largest eigenvalue is noise in a float32 curvature and signal in a float64 one.
    matrix = symmetric(torch.tensor([1e-9, 0.5, 1.0]).double(), 4)
    rows = rows_of(torch.randn(2, 3, dtype=torch.float64))
    inverse = Cholesky(damping=0.0).solve_for(MatrixOperator(matrix), CPU)
    assert gap(inverse.apply(rows).flat(), solved(matrix, 0.0, rows.flat())) < 1e-5
    with pytest.raises(NumericsError, match="singular"):
        Cholesky(damping=0.0).solve_for(MatrixOperator(matrix, dtype=torch.float32), CPU)


def test_nothing_but_zero_rows_divides_by_the_damping():
    operator = MatrixOperator(torch.zeros(4, 4, dtype=torch.float64))
    rows = rows_of(torch.randn(2, 4, dtype=torch.float64))
    inverse = Cholesky(damping=0.5).solve_for(operator, CPU)
    assert torch.equal(inverse.apply(rows).flat(), rows.flat() / 0.5)
    assert inverse.stats["zero_rows"] == 4


def test_zero_rows_are_split_off_before_factorising():
    matrix = with_zero_rows(symmetric(torch.tensor([1.0, 2.0, 6.0]), 3), 3)
    inverse = Cholesky().solve_for(MatrixOperator(matrix), CPU)
    assert tuple(inverse.factor.lower.shape) == (3, 3)


def test_rows_keep_their_dtype_and_may_be_factors():
    matrix = symmetric(torch.linspace(0.5, 3, 6), 5)
    inverse = Cholesky(damping=0.1).solve_for(MatrixOperator(matrix), CPU)
    rows = rows_of(torch.randn(3, 6, dtype=torch.float64))
    expected = solved(matrix, 0.1, rows.flat())
    assert gap(inverse.apply(factored(rows)).flat(), expected) < 1e-12
    single = inverse.apply(rows.to(dtype=torch.float32))
    assert single.dtype == torch.float32
    assert gap(single.flat().double(), expected) < 1e-6


def test_the_operator_matrix_is_not_changed():
    matrix = symmetric(torch.linspace(0.5, 3, 6), 5)

    class Lending(MatrixOperator):
        def dense(self):
            return self.matrix

    before = matrix.clone()
    Cholesky(damping=0.1).solve_for(Lending(matrix), CPU).with_damping(Damping(1.0))
    assert torch.equal(matrix, before)


class Giving(MatrixOperator):
    """Writes itself down for whoever asks, as curvatures of products do."""

    def live_dense(self):
        live = self.matrix.any(1).nonzero().squeeze(1)
        return live, self.matrix[live[:, None], live]


@settings(max_examples=60, deadline=None)
@given(systems(), st.sampled_from([1, 3, 1024]))
def test_a_factor_in_the_place_of_its_matrix_leaves_every_damping_exact(system, tile):
    matrix, zeros = system
    matrix = with_zero_rows(matrix, zeros)
    flat = torch.randn(2, len(matrix), dtype=torch.float64)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(factor, "TILE", tile)
        first = Cholesky(damping=0.25).solve_for(Giving(matrix), CPU)
        second = first.with_damping(Damping(9.0))
        third = second.with_damping(Damping(0.25))
    # The first one is asked last: no later damping may have changed it.
    for inverse, damping in ((third, 0.25), (second, 9.0), (first, 0.25)):
        found = inverse.apply(rows_of(flat)).flat()
        assert gap(found, solved(matrix, damping, flat)) < 1e-9


def test_a_matrix_that_lies_otherwise_in_memory_is_factorised_too():
    matrix = symmetric(torch.linspace(0.5, 3, 6), 5)

    class Turned(Giving):
        def live_dense(self):
            live, values = super().live_dense()
            return live, values.mT.contiguous().mT

    flat = torch.randn(2, 6, dtype=torch.float64)
    found = Cholesky(damping=0.1).solve_for(Turned(matrix), CPU).apply(rows_of(flat)).flat()
    assert gap(found, solved(matrix, 0.1, flat)) < 1e-12


def test_the_factor_takes_no_memory_of_its_own():
    matrix = symmetric(torch.linspace(0.5, 3, 6), 5)
    inverse = Cholesky(damping=0.1).solve_for(Giving(matrix), CPU)
    assert inverse.factor.lower.data_ptr() == inverse.matrix.values.data_ptr()


def test_other_spaces_are_refused():
    inverse = Cholesky().solve_for(MatrixOperator(torch.eye(4, dtype=torch.float64)), CPU)
    with pytest.raises(SpecError, match="inverse Hessian: the spaces"):
        inverse.apply(rows_of(torch.zeros(1, 5)))


def test_too_large_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda device: 16 * 100**2)
    Cholesky().check(Space((BlockSpec("v", "dense", (100,)),)))
    with pytest.raises(
        MemoryBudgetError, match=r"101 x 101.*need 159.4 KiB, 156.2 KiB are free.*cg"
    ):
        Cholesky().check(Space((BlockSpec("v", "dense", (101,)),)))
    operator = MatrixOperator(torch.eye(6, dtype=torch.float64), memory=16 * 36 - 1)
    with pytest.raises(MemoryBudgetError, match="may be used"):
        Cholesky().solve_for(operator, CPU)
    assert operator.dense_calls == 0


def test_indefinite_too_large_for_eigenvectors_is_refused(monkeypatch):
    monkeypatch.setattr("dattri_parts.solvers.factor.free_bytes", lambda device: 10)
    matrix = symmetric(torch.tensor([-1.0, 1.0]), 0)
    with pytest.raises(MemoryBudgetError, match=r"indefinite 2 x 2.*needs 128 B.*'ggn'"):
        Cholesky().solve_for(MatrixOperator(matrix), CPU)


def test_declared_facts_and_fields():
    assert Cholesky.needs == {"dense"}
    assert Cholesky.exact
    assert Cholesky().damping == Damping(1e-3)
    assert Cholesky(damping={"relative": 0.1}).damping == Damping(0.1, relative=True)
    assert matrix_space(6).dim == 6
    for wrong in (-1.0, float("nan"), float("inf"), "x", True, {"relative": -1}, {"rel": 1.0}):
        with pytest.raises(SpecError, match="damping"):
            Cholesky(damping=wrong)
