"""Arnoldi's inverse of low rank against dense eigenvectors in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from dattri_parts.solvers.arnoldi import Arnoldi
from dattri_parts.solvers.cholesky import Cholesky
from dattri_parts.solvers.krylov import krylov, largest_eigenvalue, ritz_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.dense import MatrixOperator, factored, rows_of, symmetric

from dattri_core import Damping, MemoryBudgetError, NumericsError, SpecError

CPU = torch.device("cpu")
FULL = {"rank": 10, "iterations": 10}


def rows(size, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return rows_of(torch.randn(count, size, generator=generator, dtype=torch.float64))


def low_rank(matrix, rank, damping, flat, keep=False):
    """Return V (L + damping)^-1 V^T g with the eigenvalues of largest magnitude, densely."""
    values, basis = torch.linalg.eigh(matrix)
    chosen = values.abs().argsort(descending=True)[:rank]
    values, basis = values[chosen], basis[:, chosen]
    inside = flat @ basis
    answer = inside / (values + damping) @ basis.mT
    return answer + (flat - inside @ basis.mT) / damping if keep else answer


def gap(found, expected):
    return float((found - expected).norm() / expected.norm())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 7.0]), min_size=1, max_size=10),
    st.sampled_from([0.05, 0.5]),
    st.integers(0, 99),
)
def test_at_full_rank_equals_a_dense_solve_whatever_is_multiple(eigenvalues, damping, seed):
    # Multiple eigenvalues and null spaces end a Krylov space early: new vectors go on with it.
    matrix = symmetric(torch.tensor(eigenvalues), seed)
    given_rows = rows(len(matrix), seed=seed)
    operator = MatrixOperator(matrix)
    inverse = Arnoldi(damping=damping, **FULL).solve_for(operator, CPU)
    assert operator.products == operator.vectors == len(matrix)
    shifted = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    want = torch.linalg.solve(shifted, given_rows.flat().mT).mT
    answer = inverse.apply(given_rows)
    torch.testing.assert_close(answer.flat(), want, rtol=1e-9, atol=1e-9)
    assert torch.equal(answer.index, given_rows.index)
    assert torch.equal(answer.aux["a"], given_rows.aux["a"])
    assert operator.products == len(matrix)
    explicit = Cholesky(damping=damping).solve_for(operator, CPU).apply(given_rows)
    torch.testing.assert_close(answer.flat(), explicit.flat(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("complement", ["drop", "keep"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_top_eigenvalues_are_those_of_largest_magnitude(rank, complement):
    values = torch.tensor([-6.0, -2.5, 0.1, 0.2, 0.3, 1.5, 4.0, 5.0, 0.05, 0.01])
    matrix = symmetric(values, 3)
    given_rows = rows(10)
    solver = Arnoldi(damping=0.3, rank=rank, iterations=10, complement=complement)
    with pytest.warns(RuntimeWarning, match=r"of the \d kept eigenvalues stay negative"):
        inverse = solver.solve_for(MatrixOperator(matrix), CPU)
    want = low_rank(matrix, rank, 0.3, given_rows.flat(), complement == "keep")
    assert gap(inverse.apply(given_rows).flat(), want) < 1e-11
    assert inverse.stats["largest_eigenvalue"] == pytest.approx(-6.0, rel=1e-12)
    last = values[values.abs().argsort(descending=True)[rank - 1]]
    assert inverse.stats["last_eigenvalue"] == pytest.approx(float(last), rel=1e-6)
    assert inverse.stats["negative_eigenvalues"] == (1 if rank < 4 else 2)


def test_the_kept_pairs_converge_long_before_the_space_is_full():
    values = torch.cat([torch.linspace(0.001, 0.1, 195), torch.tensor([1.0, 2.0, -3.0, 4.0, 8.0])])
    matrix = symmetric(values, 5)
    given_rows = rows(200)
    operator = MatrixOperator(matrix)
    with pytest.warns(RuntimeWarning, match="negative"):
        inverse = Arnoldi(damping=0.01, rank=5, iterations=30).solve_for(operator, CPU)
    assert operator.products == 30
    assert (
        gap(inverse.apply(given_rows).flat(), low_rank(matrix, 5, 0.01, given_rows.flat())) < 1e-9
    )
    assert inverse.stats["ritz_residual"] < 1e-10
    early = krylov(lambda v: v @ matrix, 200, 8, dtype=torch.float64, device=CPU)
    pairs = ritz_pairs(early, 8)
    left = (pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors).norm(dim=1)
    torch.testing.assert_close(pairs.bounds, left, rtol=1e-8, atol=1e-12)
    assert float(pairs.bounds.max()) > 1e-3  # there is something to bound


def test_the_basis_stays_orthonormal_in_single_precision():
    matrix = symmetric(torch.logspace(-6, 3, 120), 1).float()
    built = krylov(lambda v: v @ matrix, 120, 120, dtype=torch.float32, device=CPU)
    eye = torch.eye(120)
    assert float((built.basis @ built.basis.mT - eye).abs().max()) < 2e-6
    values = torch.linalg.eigvalsh(built.matrix)
    assert float((values - torch.logspace(-6, 3, 120).double()).abs().max()) < 2e-3
    assert built.rest < 1e-2


def test_other_dampings_take_no_product():
    matrix = symmetric(torch.linspace(0.1, 5, 10), 2)
    operator = MatrixOperator(matrix)
    inverse = Arnoldi(damping=0.1, rank=4, iterations=10).solve_for(operator, CPU)
    given_rows = rows(10)
    for damping in (1e-4, 0.3, 20.0):
        moved = inverse.with_damping(Damping(damping))
        want = low_rank(matrix, 4, damping, given_rows.flat())
        assert gap(moved.apply(given_rows).flat(), want) < 1e-9
        assert moved.stats["damping"] == damping
    assert operator.products == 10
    # A relative damping estimates the trace once: 32 vectors in one product.
    one = inverse.with_damping(Damping(0.5, relative=True))
    other = inverse.with_damping(Damping(0.25, relative=True))
    assert (operator.products, operator.vectors) == (11, 10 + 32)
    assert one.stats["damping"] == pytest.approx(2 * other.stats["damping"], rel=1e-12)


def test_reduced_rows_have_the_same_inner_products():
    matrix = symmetric(torch.linspace(-1.5, 5, 10), 4)
    operator = MatrixOperator(matrix)
    train, test = rows(10, 6, seed=1), rows(10, 4, seed=2)
    plain = {"damping": 0.1, "rank": 5, "iterations": 10}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        whole = Arnoldi(**plain).solve_for(operator, CPU)
        sides = Arnoldi(**plain, reduced=True).solve_for(operator, CPU)
    want = train.inner(whole.apply(test))
    left, right = sides.train_map.map(factored(train)), sides.apply(factored(test))
    assert left.space.dim == right.space.dim == 5
    assert float((left.inner(right) - want).abs().max()) < 1e-12
    torch.testing.assert_close(
        sides.in_basis(sides.train_map.map(test)).flat(), right.flat(), rtol=1e-12, atol=1e-12
    )
    assert whole.train_map is None
    assert sides.with_damping(Damping(3.0)).train_map is sides.train_map
    products = operator.products
    sides.with_damping(Damping(3.0)).apply(test)
    assert operator.products == products
    back = sides.train_map.adjoint(left)
    assert back.space == train.space
    torch.testing.assert_close(
        back.flat() @ train.flat().mT, left.flat() @ left.flat().mT, rtol=1e-12, atol=1e-12
    )
    half = sides.train_map.map(train.to(dtype=torch.bfloat16))
    assert half.dtype == torch.float32


def test_declared_space_without_a_tensor():
    space = rows(10).space
    assert Arnoldi().out_space(space) is space
    assert Arnoldi(reduced=True, rank=4).out_space(space).dim == 4
    assert Arnoldi(reduced=True).out_space(space).dim == 10  # no more than there are parameters


def test_a_zero_operator_is_dropped_or_divided_by_the_damping():
    operator, given_rows = MatrixOperator(torch.zeros(6, 6).double()), rows(6)
    inverse = Arnoldi(damping=0.5, rank=3, iterations=6, complement="keep").solve_for(operator, CPU)
    torch.testing.assert_close(inverse.apply(given_rows).flat(), 2 * given_rows.flat())
    assert inverse.stats["ritz_residual"] == 0.0


def test_what_cannot_be_inverted_is_refused_with_the_cure():
    singular = MatrixOperator(symmetric(torch.tensor([0.0, 0.0, 1.0, 2.0]), 3))
    with pytest.raises(NumericsError, match="give a damping above"):
        Arnoldi(damping=0.0, rank=4, iterations=4).solve_for(singular, CPU)
    with pytest.raises(NumericsError, match="complement='keep' divides"):
        Arnoldi(damping=0.0, rank=2, iterations=4, complement="keep").solve_for(singular, CPU)
    pseudo = Arnoldi(damping=0.0, rank=2, iterations=4).solve_for(singular, CPU)
    given_rows = rows(4)
    want = given_rows.flat() @ torch.linalg.pinv(singular.matrix)
    torch.testing.assert_close(pseudo.apply(given_rows).flat(), want, rtol=1e-9, atol=1e-9)
    bad = MatrixOperator(torch.full((4, 4), float("nan")).double())
    with pytest.raises(NumericsError, match="product is not finite"):
        Arnoldi(rank=2, iterations=4).solve_for(bad, CPU)
    with pytest.raises(SpecError, match="inverse Hessian: the spaces"):
        pseudo.apply(rows(5))
    with pytest.raises(MemoryBudgetError, match=r"solver 'arnoldi'.*fewer iterations"):
        Arnoldi().solve_for(MatrixOperator(torch.eye(50).double(), memory=1000), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"damping": -1.0}, "damping"),
    ],
)
def test_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        Arnoldi(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 9, "iterations": 8}, "rank 9 of a Krylov space of 8"),
        ({"reduced": True, "complement": "keep"}, "no part outside of the span"),
    ],
)
def test_fields_that_contradict_are_refused_together(changes, message):
    solver = Arnoldi(**changes)  # overrides come one by one
    with pytest.raises(SpecError, match=message):
        solver.check(rows(10).space)
    with pytest.raises(SpecError, match=message):
        solver.solve_for(MatrixOperator(torch.eye(10).double()), CPU)


@pytest.mark.parametrize("size", [1, 2, 8, 43, 60])
def test_the_largest_eigenvalue_is_seldom_more_than_a_tenth_too_low(size):
    low = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(size, generator=generator, dtype=torch.float64).exp()
        values = values * torch.where(torch.rand(size, generator=generator) < 0.3, -1.0, 1.0)
        matrix = symmetric(values, seed)
        found = largest_eigenvalue(lambda v, m=matrix: v @ m, size, dtype=torch.float64, device=CPU)
        truth = float(values.abs().max())
        assert 0.7 * truth <= found <= 1.5 * truth
        low += found < 0.9 * truth
    assert low <= 4
