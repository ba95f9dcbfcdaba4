"""LiSSA with a preconditioner against its series written out, and against dense solves."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import attrs
import pytest
import torch
from attrs import define, field
from dattri_parts.solvers import neumann
from dattri_parts.solvers.lissa import LiSSA
from dattri_parts.solvers.pencil import largest_relative_eigenvalue
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.dense import MatrixOperator, matrix_space, rows_of, symmetric
from oracles.toy_tasks import examples, mlp

import dattri_core as dattri
from dattri_core import ConvergenceWarning, Damping, NumericsError, RandomStream, Rows

CPU = torch.device("cpu")


@define(eq=False)
class MatrixInverse:
    """A symmetric matrix as a preconditioner; counts the rows that pass it."""

    matrix: torch.Tensor
    rows: int = 0
    stats: Mapping[str, float] = field(factory=dict)
    blockwise: bool = False

    def apply(self, rows: Rows) -> Rows:
        self.rows += len(rows)
        flat = (rows.flat().double() @ self.matrix).to(rows.dtype)
        return Rows.from_flat(rows.space, flat, rows.index, rows.aux)


@define(eq=False)
class Itself:
    """An inverse that gives the rows that it gets, the same tensors."""

    stats: Mapping[str, float] = field(factory=dict)
    blockwise: bool = True

    def apply(self, rows: Rows) -> Rows:
        return rows


@define(eq=False)
class MeanOperator:
    """The mean of matrices, one an example."""

    matrices: torch.Tensor  # [n, d, d]
    memory: int = 2**30
    dtype: torch.dtype = torch.float64
    groups: list[int] = field(factory=list)

    @property
    def space(self):
        return matrix_space(self.matrices.shape[1])

    @property
    def n_train(self):
        return len(self.matrices)

    @property
    def random(self):
        return RandomStream(3, "curvature")

    def apply_on(self, rows, index):
        self.groups.append(len(rows))
        flat = rows.flat().double() @ self.matrices[index].mean(0)
        return Rows.from_flat(self.space, flat.to(self.dtype), rows.index)


def drawn(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


def damped(matrix, damping):
    return matrix + damping * torch.eye(len(matrix), dtype=torch.float64)


def near_inverse(matrix, seed=0, spread=0.5):
    """Return A^-1/2 E A^-1/2 with E near to the identity: M A has the eigenvalues of E."""
    values, basis = torch.linalg.eigh(matrix)
    root = basis @ torch.diag(values.rsqrt()) @ basis.mT
    turned = torch.eye(len(matrix), dtype=torch.float64)
    turned += spread / len(matrix) * drawn(len(matrix), len(matrix), seed)
    return root @ turned @ turned.mT @ root


def gap(found, expected):
    return float((found - expected).norm() / expected.norm())


# --- on the whole train set -----------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.0, 10.0), min_size=1, max_size=8),
    st.integers(0, 4),
    st.sampled_from([0.01, 1.0]),
    st.integers(0, 99),
)
def test_the_limit_is_the_inverse_whatever_m_is(eigenvalues, count, damping, seed):
    matrix = symmetric(torch.tensor(eigenvalues).double(), seed)
    whole = damped(matrix, damping)
    m = MatrixInverse(near_inverse(whole, seed))
    flat = drawn(count, len(matrix), seed)
    solver = LiSSA(damping=damping, batch=None, depth=20_000)
    inverse = solver.precondition(MatrixOperator(matrix), CPU, m)
    answer = inverse.apply(rows_of(flat))
    torch.testing.assert_close(answer.flat(), flat @ torch.linalg.inv(whole), rtol=1e-8, atol=1e-9)
    assert torch.equal(answer.index, rows_of(flat).index)


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("scale", [0.8, 1.0, 3.0])
def test_every_step_is_that_of_the_series(depth, scale):
    matrix = symmetric(torch.logspace(-2, 1, 9), 1)
    whole, flat = damped(matrix, 0.05), drawn(4, 9)
    m = near_inverse(whole, 2)
    solver = LiSSA(damping=0.05, batch=None, depth=depth, scale=scale)
    inverse = solver.precondition(MatrixOperator(matrix), CPU, MatrixInverse(m))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        got = inverse.apply(rows_of(flat)).flat()
    # M^(1/2) sum_k (I - B / s)^k M^(1/2) / s with B = M^(1/2) A M^(1/2), for k up to the depth.
    values, basis = torch.linalg.eigh(m)
    root = basis @ torch.diag(values.sqrt()) @ basis.mT
    values, basis = torch.linalg.eigh(root @ whole @ root)
    terms = sum((1 - values / scale) ** k for k in range(depth + 1)) / scale
    want = flat @ root @ basis @ torch.diag(terms) @ basis.mT @ root
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    before = sum((1 - values / scale) ** k for k in range(depth)) / scale
    x = flat @ root @ basis @ torch.diag(before) @ basis.mT @ root
    left = (flat - x @ whole).norm(dim=1) / flat.norm(dim=1)
    assert inverse.stats["residual"] == pytest.approx(float(left.max()), rel=1e-9)


def test_a_good_m_needs_few_steps_where_none_needs_many():
    matrix = symmetric(torch.logspace(-4, 1, 12), 1)
    whole, flat = damped(matrix, 1e-4), drawn(3, 12)
    solver = LiSSA(damping=1e-4, batch=None, depth=60)
    m = MatrixInverse(near_inverse(whole, 3, spread=0.3))
    helped = solver.precondition(MatrixOperator(matrix), CPU, m)
    want = flat @ torch.linalg.inv(whole)
    assert gap(helped.apply(rows_of(flat)).flat(), want) < 1e-6
    with pytest.warns(ConvergenceWarning, match="after 60 steps"):
        alone = solver.solve_for(MatrixOperator(matrix), CPU).apply(rows_of(flat)).flat()
    assert gap(alone, want) > 0.5


def test_the_inverse_itself_is_done_at_once():
    matrix = symmetric(torch.linspace(0.5, 5, 8), 1)
    whole, flat = damped(matrix, 0.1), drawn(3, 8)
    operator = MatrixOperator(matrix)
    m = MatrixInverse(torch.linalg.inv(whole))
    solver = LiSSA(damping=0.1, batch=None, depth=500, scale=1.0)
    inverse = solver.precondition(operator, CPU, m)
    assert gap(inverse.apply(rows_of(flat)).flat(), flat @ m.matrix) < 1e-13
    assert inverse.stats["iterations"] <= 3
    assert inverse.stats["residual"] < 1e-13
    assert operator.products == inverse.stats["iterations"]
    assert m.rows == 3 * (1 + operator.products)


def test_an_m_that_gives_its_rows_back_changes_nothing():
    matrix, flat = symmetric(torch.linspace(0.5, 5, 8), 1), drawn(3, 8)
    solver = LiSSA(damping=0.1, batch=None, depth=400, scale=6.0)
    plain = solver.solve_for(MatrixOperator(matrix), CPU)
    same = solver.precondition(MatrixOperator(matrix), CPU, Itself())
    want, got = plain.apply(rows_of(flat)).flat(), same.apply(rows_of(flat)).flat()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert plain.stats["residual"] < 1e-13
    assert same.stats["residual"] < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_that_m_stretches_is_not_taken_for_divergence(monkeypatch, dtype):
    matrix = symmetric(torch.logspace(-4, 4, 24), 1)
    whole, flat = damped(matrix, 1e-4), drawn(5, 24)
    operator = MatrixOperator(matrix, dtype=dtype)
    m = MatrixInverse(near_inverse(whole, 5, spread=1.0))
    solver = LiSSA(damping=1e-4, batch=None, depth=1000)
    inverse = solver.precondition(operator, CPU, m)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of |g - A x| in float32
        found = inverse.apply(rows_of(flat.to(dtype))).flat().double()
    most = {torch.float32: 1e-3, torch.float64: 1e-8}  # at a condition of 1e8
    assert gap(found, flat @ torch.linalg.inv(whole)) < most[dtype]
    assert inverse.stats["iterations"] < 200  # it stops when a step is no shorter than the last
    monkeypatch.setattr(neumann, "ROUNDED", 0.0)
    with pytest.raises(NumericsError, match="diverges from step"):
        inverse.apply(rows_of(flat.to(dtype)))


def test_another_damping_is_as_from_the_start():
    matrix, flat = symmetric(torch.logspace(-2, 1, 9), 1), drawn(2, 9)
    m = MatrixInverse(near_inverse(damped(matrix, 0.01), 2))
    solver = LiSSA(damping=0.01, batch=None, depth=300)
    first = solver.precondition(MatrixOperator(matrix), CPU, m)
    first.apply(rows_of(flat))
    again = first.with_damping(Damping(3.0))
    fresh = attrs.evolve(solver, damping=3.0).precondition(MatrixOperator(matrix), CPU, m)
    assert torch.equal(again.apply(rows_of(flat)).flat(), fresh.apply(rows_of(flat)).flat())
    assert again.stats == fresh.stats
    assert again.stats["scale"] > 2 * first.stats["scale"]


# --- the scale ------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 99), st.sampled_from([torch.float64, torch.float32]))
def test_the_largest_eigenvalue_of_m_a(size, seed, dtype):
    whole = symmetric(torch.logspace(-3, 1, size).double(), seed)
    m = near_inverse(whole, seed + 1)
    found = largest_relative_eigenvalue(
        lambda v: (v.double() @ whole).to(dtype),
        lambda v: (v.double() @ m).to(dtype),
        size,
        dtype=dtype,
        device=CPU,
    )
    largest = float(torch.linalg.eigvals(m @ whole).abs().max())
    assert 0.85 * largest <= found <= 1.5 * largest


def test_a_curvature_of_nothing_has_no_largest_eigenvalue():
    zero = largest_relative_eigenvalue(
        torch.zeros_like, lambda v: 2 * v, 5, dtype=torch.float64, device=CPU
    )
    assert zero == 0
    flat = drawn(2, 5)
    m = MatrixInverse(torch.eye(5).double())
    inverse = LiSSA(damping=0.5, batch=None).precondition(MatrixOperator(torch.zeros(5, 5)), CPU, m)
    assert gap(inverse.apply(rows_of(flat)).flat(), 2 * flat) < 1e-12


# --- what is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("values", [[-1.0, -0.5, -2.0, -1.0], [-50.0, 0.1, 0.1, 0.1], [0.0] * 4])
def test_an_m_that_is_not_positive_definite(scale, values):
    matrix = symmetric(torch.linspace(1, 2, 4), 1)
    m = MatrixInverse(torch.diag(torch.tensor(values).double()))
    inverse = LiSSA(batch=None, scale=scale, depth=50).precondition(MatrixOperator(matrix), CPU, m)
    if scale is not None and not any(values):
        with pytest.warns(ConvergenceWarning, match="residual is 1;"):
            inverse.apply(rows_of(drawn(3, 4)))
        return
    with pytest.raises(NumericsError, match=r"<., M .> is .*give its solver more damping"):
        inverse.apply(rows_of(drawn(3, 4)))


def test_a_negative_eigenvalue_and_a_scale_too_small_are_errors_as_soon_as_they_show():
    m = MatrixInverse(torch.diag(torch.tensor([0.1, 3.0, 1.0, 2.0, 0.5]).double()))
    indefinite = symmetric(torch.tensor([-1.0, 0.5, 1.0, 2.0, 3.0]), 1)
    for matrix, scale in ((indefinite, None), (symmetric(torch.linspace(1, 3, 5), 1), 0.4)):
        operator = MatrixOperator(matrix)
        inverse = LiSSA(damping=0.1, batch=None, depth=5000, scale=scale)
        with pytest.raises(NumericsError, match=r"diverges from step \d+ on"):
            inverse.precondition(operator, CPU, m).apply(rows_of(drawn(5, 5)))
        assert operator.products < 40


# --- on samples -----------------------------------------------------------------------------------
def squares(count=20, size=6):
    x = drawn(count, size)
    return MeanOperator(x[:, :, None] * x[:, None])


def recursion(operator, flat, m, damping, scale, depth, batch, repeats):
    """Return the mean over repeats of M v_depth / scale, drawn as the solver says it draws."""
    total = torch.zeros_like(flat)
    for repeat in range(repeats):
        v = flat
        for step in range(depth):
            generator = operator.random.generator("lissa", repeat, step)
            index = torch.randint(operator.n_train, (batch,), generator=generator)
            v = flat + v - v @ m @ damped(operator.matrices[index].mean(0), damping) / scale
        total = total + v @ m / scale
    return total / repeats


@pytest.mark.parametrize(("batch", "repeats"), [(1, 1), (4, 3)])
def test_samples_follow_the_recursion(batch, repeats):
    operator, flat = squares(), drawn(3, 6, seed=1)
    m = near_inverse(damped(operator.matrices.mean(0), 0.2), 4)
    solver = LiSSA(damping=0.2, batch=batch, repeats=repeats, depth=33, scale=40.0)
    inverse = solver.precondition(operator, CPU, MatrixInverse(m))
    want = recursion(operator, flat, m, 0.2, 40.0, 33, batch, repeats)
    torch.testing.assert_close(inverse.apply(rows_of(flat)).flat(), want, rtol=1e-11, atol=1e-12)
    assert operator.groups == [3] * 33 * repeats  # all rows in one product
    assert inverse.stats["iterations"] == 33
    assert "residual" not in inverse.stats


def test_rows_do_not_depend_on_what_they_come_with_or_on_memory():
    flat = drawn(5, 6, seed=1)
    m = near_inverse(damped(squares().matrices.mean(0), 0.5), 4)
    solver = LiSSA(damping=0.5, batch=3, depth=50)

    def answer(operator, flat):
        return solver.precondition(operator, CPU, MatrixInverse(m)).apply(rows_of(flat)).flat()

    whole = answer(squares(), flat)
    torch.testing.assert_close(answer(squares(), flat[2:3]), whole[2:3], rtol=1e-12, atol=1e-14)
    tight = squares()
    tight.memory = 10 * 6 * 8 * 2
    torch.testing.assert_close(answer(tight, flat), whole, rtol=1e-12, atol=1e-14)
    assert set(tight.groups) == {1, 2}


def test_rows_that_diverge_at_an_estimated_scale_are_summed_at_twice_it():
    diagonal = 0.5 + torch.rand(40, 6, generator=torch.Generator().manual_seed(0)).double()
    diagonal[:, 0] = 0.0
    diagonal[17] = 0.0
    diagonal[17, 0] = 30.0
    operator = MeanOperator(torch.diag_embed(diagonal))
    m = torch.linalg.inv(damped(operator.matrices.mean(0), 0.5))
    flat = drawn(4, 6)
    flat[:, 0] = torch.tensor([5.0, 0.5, 0.0, 0.0])  # two never see the example that is unlike
    solver = LiSSA(damping=0.5, batch=2, depth=80)
    inverse = solver.precondition(operator, CPU, MatrixInverse(m))
    with pytest.warns(ConvergenceWarning, match="of 4 rows diverged at the estimated scale"):
        got = inverse.apply(rows_of(flat)).flat()
    base = inverse.stats["scale"]
    assert inverse.stats["widened"] in (1, 2)
    scales = [base * 2**k for k in range(7)]
    for k in range(4):
        nearest = [
            s
            for s in scales
            if gap(got[k], recursion(operator, flat[k : k + 1], m, 0.5, s, 80, 2, 1)[0]) < 1e-9
        ]
        assert len(nearest) == 1
        assert (nearest[0] == base) == (k > 1) or inverse.stats["widened"] == 1
    assert len(operator.groups) > neumann.PROBED * 6 + 80


# --- of networks ----------------------------------------------------------------------------------
def test_an_ekfac_makes_the_series_of_a_network_converge():
    task = dattri.Task(mlp(), "cross-entropy")
    train, test = examples(24, seed=1), examples(4, seed=2)
    exact = dattri.attribute(task, train, test, method="if-woodbury", damping=1e-3)
    plain = dattri.method("if-lissa", damping=1e-3, batch=None, depth=100)
    helped = dattri.method(
        "if-lissa",
        damping=1e-3,
        batch=None,
        depth=100,
        preconditioner={
            "curvature": {"name": "ekfac", "fisher": "ggn"},
            "solver": {"name": "spectral", "damping": 1e-3},
        },
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        far = plain.attribute(task, train, test).values
        found = helped.attribute(task, train, test).values
    assert gap(found, exact.values) < 0.6 * gap(far, exact.values)


def test_the_recipe_goes_from_ekfac_to_the_exact_matrix():
    """Of all data its limit is the dense solve, whatever EK-FAC is; few steps are on the way."""
    task, train, test = dattri.Task(mlp()), examples(20), examples(4, seed=300)
    exact = dattri.attribute(task, train, test, method="if-woodbury", damping=0.05).values

    def off(depth):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = dattri.attribute(
                task, train, test, method="astra", damping=0.05, batch=None, depth=depth
            )
        return float((found.values - exact).norm() / exact.norm())

    far, nearer, there = off(1), off(20), off(1500)
    assert far > 2 * nearer > 4 * there
    assert there < 1e-8
