"""Preconditioned conjugate gradients: the same answer in fewer products."""

from __future__ import annotations

import warnings

import attrs
import pytest
import torch
from dattri_parts.curvatures.ggn import GGN
from dattri_parts.curvatures.hessian import Hessian
from dattri_parts.solvers.arnoldi import Arnoldi
from dattri_parts.solvers.cg import CG
from dattri_parts.solvers.cholesky import Cholesky
from oracles.dense import MatrixOperator, rows_of, symmetric
from oracles.toy_tasks import examples, mlp, world

import dattri_core as dattri
from dattri_core import (
    ConvergenceWarning,
    CurvatureInverse,
    Damping,
    NumericsError,
    PreconditionedSolver,
    SpecError,
)
from dattri_core.space import BlockSpec, Space

CPU = torch.device("cpu")


def solved(matrix, damping, flat):
    shifted = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    return torch.linalg.solve(shifted, flat.double().mT).mT


def gap(found, expected):
    return float((found - expected).norm() / expected.norm())


def ill_conditioned(size=40, seed=0, count=3):
    torch.manual_seed(seed)
    matrix = symmetric(torch.logspace(-4, 3, size), seed)
    return matrix, rows_of(torch.randn(count, size, dtype=torch.float64))


def near(matrix, damping=1e-3, noise=0.05, seed=1):
    """Return the inverse of a matrix near to another: each eigenvalue off by some per cent."""
    values, basis = torch.linalg.eigh(matrix)
    generator = torch.Generator().manual_seed(seed)
    factor = 1 + noise * torch.randn(len(values), generator=generator, dtype=torch.float64)
    other = (basis * (values * factor.abs())) @ basis.mT
    return Cholesky(damping=damping).solve_for(MatrixOperator((other + other.mT) / 2), CPU)


def preconditioned(matrix, b, inverse, iterations):
    """Return the iterates of the textbook (Nocedal and Wright 2006, algorithm 5.3)."""
    x, r = torch.zeros_like(b), b.clone()
    y = inverse(r)
    p, iterates = y.clone(), []
    for _ in range(iterations):
        product = matrix @ p
        alpha = (r @ y) / (p @ product)
        x = x + alpha * p
        after = r - alpha * product
        z = inverse(after)
        p = z + (after @ z) / (r @ y) * p
        r, y = after, z
        iterates.append(x)
    return iterates


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_rows_follow_the_textbook_iterates(iterations):
    matrix, rows = ill_conditioned(size=9)
    shifted = matrix + 0.01 * torch.eye(9, dtype=torch.float64)
    inverse = near(matrix, noise=0.5)
    solver = CG(damping=0.01, maximum_iterations=iterations, tolerance=0.0)
    fitted = solver.precondition(MatrixOperator(matrix), CPU, inverse)
    with pytest.warns(ConvergenceWarning, match="did not reach"):
        got = fitted.apply(rows).flat()

    def apply(vector):
        return inverse.apply(rows_of(vector[None])).flat()[0]

    for found, b in zip(got, rows.flat(), strict=True):
        want = preconditioned(shifted, b, apply, iterations)[-1]
        torch.testing.assert_close(found, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_answer_is_the_same_after_far_fewer_products(seed):
    matrix, rows = ill_conditioned(seed=seed)
    want = solved(matrix, 1e-3, rows.flat())
    solver = CG(damping=1e-3, maximum_iterations=2000, tolerance=1e-10)
    plain, helped = MatrixOperator(matrix), MatrixOperator(matrix)
    alone = solver.solve_for(plain, CPU)
    assert gap(alone.apply(rows).flat(), want) < 1e-4
    inverse = solver.precondition(helped, CPU, near(matrix))
    assert gap(inverse.apply(rows).flat(), want) < 1e-6
    assert inverse.stats["converged"] == 3
    assert inverse.stats["residual"] <= 1e-10
    assert helped.products < plain.products / 5
    # The residual is that of the system, not of the preconditioned one.
    left = inverse.apply(rows).flat() @ (matrix + 1e-3 * torch.eye(40).double()) - rows.flat()
    assert float((left.norm(dim=1) / rows.flat().norm(dim=1)).max()) < 1e-9


def test_the_exact_inverse_needs_one_product():
    matrix, rows = ill_conditioned(size=12)
    operator = MatrixOperator(matrix)
    exact = Cholesky(damping=0.1).solve_for(MatrixOperator(matrix), CPU)
    inverse = CG(damping=0.1).precondition(operator, CPU, exact)
    assert gap(inverse.apply(rows).flat(), solved(matrix, 0.1, rows.flat())) < 1e-9
    assert operator.products == 1


def test_another_damping_keeps_the_preconditioner():
    matrix, rows = ill_conditioned()
    solver = CG(damping=1e-3, maximum_iterations=500, tolerance=1e-11)
    inverse = solver.precondition(MatrixOperator(matrix), CPU, near(matrix, damping=1e-2))
    moved = inverse.with_damping(Damping(1e-2))
    assert gap(moved.apply(rows).flat(), solved(matrix, 1e-2, rows.flat())) < 1e-7
    assert moved.stats["iterations"] < 20


def test_rows_that_are_solved_leave_and_zero_stays_zero():
    matrix, _ = ill_conditioned(size=8)
    basis = torch.linalg.eigh(matrix).eigenvectors
    rows = rows_of(torch.stack([basis[:, 7], torch.zeros(8).double(), torch.ones(8).double()]))
    operator = MatrixOperator(matrix)
    inverse = CG(damping=0.1, tolerance=1e-9).precondition(operator, CPU, near(matrix))
    got = inverse.apply(rows).flat()
    assert torch.equal(got[1], torch.zeros(8).double())
    assert gap(got, solved(matrix, 0.1, rows.flat())) < 1e-8
    assert operator.vectors < 2 * operator.products


def test_negative_curvature_stops_a_row_as_without_a_preconditioner():
    matrix = symmetric(torch.tensor([-2.0, 0.5, 1.0, 2.0, 3.0, 4.0]), 7)
    basis = torch.linalg.eigh(matrix).eigenvectors
    positive = symmetric(torch.tensor([2.0, 0.5, 1.0, 2.0, 3.0, 4.0]), 7)
    helper = Cholesky(damping=0.1).solve_for(MatrixOperator(positive), CPU)
    rows = rows_of(torch.stack([basis[:, 0], basis[:, 1] + basis[:, 4]]))
    inverse = CG(damping=0.1, tolerance=1e-10).precondition(MatrixOperator(matrix), CPU, helper)
    with pytest.warns(ConvergenceWarning, match="1 of 2 rows met negative curvature"):
        got = inverse.apply(rows).flat()
    torch.testing.assert_close(got[0], helper.apply(rows).flat()[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[1], solved(matrix, 0.1, rows.flat())[1], rtol=1e-8, atol=1e-9)


def test_a_preconditioner_that_is_not_positive_is_an_error():
    matrix, rows = ill_conditioned(size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        negative = Cholesky(damping=0.0).solve_for(MatrixOperator(-matrix), CPU)
    inverse = CG().precondition(MatrixOperator(matrix), CPU, negative)
    with pytest.raises(NumericsError, match=r"preconditioner M is not positive.*more damping"):
        inverse.apply(rows)


def test_half_precision_rows_are_solved_in_single():
    matrix, rows = ill_conditioned(size=8)
    operator = MatrixOperator(matrix, dtype=torch.float32)
    inverse = CG(damping=0.5, tolerance=1e-6).precondition(operator, CPU, near(matrix, 0.5))
    answer = inverse.apply(rows.to(dtype=torch.bfloat16))
    assert answer.dtype == torch.bfloat16
    want = solved(matrix, 0.5, rows.flat())
    assert gap(answer.flat().double(), want) < 2e-2


# --- as a method ----------------------------------------------------------------------------------
HELPED = {
    "curvature": "hessian",
    "solver": {"name": "cg", "damping": 0.5, "tolerance": 1e-10, "maximum_iterations": 300},
    "preconditioner": {"curvature": "ggn", "solver": {"name": "cholesky", "damping": 0.2}},
}


def test_on_a_network_with_the_ggn_as_the_preconditioner():
    task, train, test = world(n_train=30)
    plain = {key: value for key, value in HELPED.items() if key != "preconditioner"}
    reports, values = [], []
    for inverse_hessian in (plain, HELPED):
        method = dattri.Method(inverse_hessian=inverse_hessian)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            scores = method.attribute(task, train, test)
        values.append(scores.values)
        reports.append(scores.provenance["solver"][0])
    exact = dattri.method("if-explicit", damping=0.5).attribute(task, train, test).values
    assert reports[1]["negative_curvature"] == 0
    torch.testing.assert_close(values[1], exact, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(values[1], values[0], rtol=1e-7, atol=1e-8)
    assert reports[1]["iterations"] < reports[0]["iterations"]


def test_the_largest_eigenvectors_and_factors_of_a_trained_model_help():
    task = dattri.Task(mlp((6, 8, 4)))
    train, test = examples(60, 6, 4), examples(5, 6, 4, seed=300)
    solver = {"name": "cg", "damping": 1e-3, "tolerance": 1e-8, "maximum_iterations": 400}
    top = {"name": "arnoldi", "damping": 1e-3, "rank": 30, "iterations": 60, "complement": "keep"}
    helpers = (None, {"curvature": "ggn", "solver": top})
    values, iterations = [], []
    for helper in helpers:
        inverse = {"curvature": "ggn", "solver": solver, "preconditioner": helper}
        scores = dattri.Method(inverse_hessian=inverse).attribute(task, train, test)
        values.append(scores.values)
        iterations.append(scores.provenance["solver"][0]["iterations"])
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-5)
    assert iterations[1] < iterations[0] / 2


def test_kronecker_factors_help_where_they_are_near():
    # One layer: all that the factors leave out is that inputs and slopes go together.
    task = dattri.Task(mlp((12, 3)))
    train, test = examples(200, 12, 3), examples(5, 12, 3, seed=300)
    scaled = (train[0] * torch.logspace(-1, 1, 12), train[1])
    solver = {"name": "cg", "damping": 1e-3, "tolerance": 1e-8, "maximum_iterations": 400}
    values, iterations = [], []
    for name in (None, "kfac", "ekfac"):
        helper = name and {
            "curvature": {"name": name, "fisher": "ggn"},
            "solver": {"name": "spectral", "damping": 1e-3},
        }
        inverse = {"curvature": "ggn", "solver": solver, "preconditioner": helper}
        scores = dattri.Method(inverse_hessian=inverse).attribute(task, scaled, test)
        values.append(scores.values)
        iterations.append(scores.provenance["solver"][0]["iterations"])
    for other, count in zip(values[1:], iterations[1:], strict=True):
        torch.testing.assert_close(other, values[0], rtol=1e-5, atol=1e-5)
        assert count < iterations[0] / 2


def test_the_spec_goes_both_ways():
    method = dattri.Method(inverse_hessian=HELPED)
    inverse = method.inverse_hessian
    assert inverse.preconditioner == CurvatureInverse(GGN(), Cholesky(damping=0.2))
    spec = method.to_spec()
    assert spec["inverse_hessian"]["preconditioner"] == HELPED["preconditioner"]
    assert dattri.Method(**spec) == method
    without = attrs.evolve(inverse, preconditioner=None)
    assert (
        "preconditioner" not in dattri.Method(inverse_hessian=without).to_spec()["inverse_hessian"]
    )


def test_overrides_mean_the_solver_unless_they_say_preconditioner():
    helper = {"curvature": "ggn", "solver": {"name": "cholesky", "damping": 0.2}}
    method = dattri.method("if-cg", preconditioner=helper, damping=0.3, curvature="ggn")
    inverse = method.inverse_hessian
    assert (inverse.solver.damping, inverse.curvature) == (Damping(0.3), GGN())
    assert inverse.preconditioner == CurvatureInverse(GGN(), Cholesky(damping=0.2))
    inner = dattri.method(
        "if-cg",
        preconditioner=helper,
        **{"preconditioner.solver.damping": 0.5, "preconditioner.curvature": "hessian"},
    ).inverse_hessian
    assert inner.solver.damping == Damping(1e-3)
    assert inner.preconditioner == CurvatureInverse(Hessian(), Cholesky(damping=0.5))
    assert dattri.method(
        "if-cg", preconditioner="identity"
    ).inverse_hessian.preconditioner.needs == (frozenset())


def test_sweeps_reuse_the_preconditioner():
    task, train, test = world(n_train=20)
    fitted = dattri.Method(inverse_hessian=HELPED).fit(task, train)
    step = fitted._held.chain.inverses[0]
    moved = fitted.with_(damping=0.6)
    assert moved._held.chain.inverses[0].preconditioner is step.preconditioner
    fresh = dattri.Method(
        inverse_hessian={**HELPED, "solver": {**HELPED["solver"], "damping": 0.6}}
    )
    torch.testing.assert_close(
        moved.attribute(test).values,
        fresh.attribute(task, train, test).values,
        rtol=1e-8,
        atol=1e-9,
    )
    assert fitted.with_(**{"preconditioner.solver.damping": 0.4})._held is None


def test_what_does_not_fit_is_refused_without_a_tensor():
    space = Space((BlockSpec("any", "dense", (3,)),))
    helper = CurvatureInverse(GGN(), Cholesky())
    assert isinstance(CG(), PreconditionedSolver)
    assert CurvatureInverse(Hessian(), CG(), helper).needs == {"hessian-product", "ggn-product"}
    with pytest.raises(SpecError, match=r"Cholesky takes no preconditioner; use the solver 'cg'"):
        CurvatureInverse(Hessian(), Cholesky(), helper).check(space)
    reduced = CurvatureInverse(GGN(), Arnoldi(reduced=True))
    with pytest.raises(SpecError, match="a preconditioner gives whole rows"):
        CurvatureInverse(Hessian(), CG(), reduced).check(space)
    with pytest.raises(SpecError, match="rank 9 of a Krylov space"):
        contradicting = CurvatureInverse(GGN(), Arnoldi(rank=9, iterations=8))
        CurvatureInverse(Hessian(), CG(), contradicting).check(space)
    with pytest.raises(SpecError, match="inverse hessian: got 3"):
        dattri.Method(inverse_hessian={**HELPED, "preconditioner": 3})
