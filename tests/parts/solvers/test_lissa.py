"""LiSSA against its recursion written out, and against dense solves in float64."""

from __future__ import annotations

import re
import warnings

import attrs
import pytest
import torch
from attrs import define
from dattri_parts.curvatures.ggn import GGN
from dattri_parts.curvatures.hessian import Hessian
from dattri_parts.solvers.lissa import LiSSA
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.dense import MatrixOperator, factored, matrix_space, rows_of, symmetric
from oracles.toy_tasks import examples, mlp, world

import dattri_core as dattri
from dattri_core import (
    ConvergenceWarning,
    Damping,
    NumericsError,
    RandomStream,
    Rows,
    SpecError,
    pages,
)

CPU = torch.device("cpu")


@define(eq=False)
class MeanOperator:
    """The mean of matrices, one an example; keeps what it was asked for."""

    matrices: torch.Tensor  # [n, d, d]
    memory: int = 2**30
    seed: int = 0
    dtype: torch.dtype = torch.float64
    drawn: list = attrs.field(factory=list)
    products: int = 0

    @property
    def space(self):
        return matrix_space(self.matrices.shape[1])

    @property
    def n_train(self):
        return len(self.matrices)

    @property
    def random(self):
        return RandomStream(self.seed, "curvature")

    def apply(self, rows):
        self.products += 1
        return self._times(rows, self.matrices.mean(0))

    def apply_on(self, rows, index):
        self.drawn.append((len(rows), index.tolist()))
        return self._times(rows, self.matrices[index].mean(0))

    def _times(self, rows, matrix):
        flat = rows.flat().double() @ matrix
        return Rows.from_flat(self.space, flat.to(self.dtype), rows.index)


def squares(count=20, size=6, seed=0):
    """Return an operator of outer products x x^T, as of squared errors of a linear model."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return MeanOperator(x[:, :, None] * x[:, None])


def rows(size, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return rows_of(torch.randn(count, size, generator=generator, dtype=torch.float64))


def solved(matrix, damping, flat):
    shifted = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    return torch.linalg.solve(shifted, flat.mT).mT


def gap(found, expected):
    return float((found - expected).norm() / expected.norm())


# --- on the whole train set -----------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.0, 10.0), min_size=1, max_size=8),
    st.integers(0, 4),
    st.sampled_from([0.1, 1.0]),
    st.integers(0, 99),
)
def test_the_limit_is_the_inverse_at_the_true_damping(eigenvalues, count, damping, seed):
    matrix = symmetric(torch.tensor(eigenvalues).double(), seed)
    given_rows = rows(len(matrix), count, seed)
    operator = MatrixOperator(matrix)
    inverse = LiSSA(damping=damping, batch=None, depth=10_000).solve_for(operator, CPU)
    answer = inverse.apply(given_rows)
    torch.testing.assert_close(
        answer.flat(), solved(matrix, damping, given_rows.flat()), rtol=1e-9, atol=1e-10
    )
    assert torch.equal(answer.index, given_rows.index)
    assert inverse.stats["iterations"] < 10_000  # it stops when the sum no longer changes
    assert inverse.stats["damping"] == damping


@pytest.mark.parametrize("scale", [4.0, 10.0, 30.0])
def test_the_scale_changes_the_pace_and_not_the_limit(scale):
    matrix = symmetric(torch.linspace(0.5, 5, 8), 1)
    given_rows = rows(8)
    solver = LiSSA(damping=0.1, batch=None, depth=5000, scale=scale)
    inverse = solver.solve_for(MatrixOperator(matrix), CPU)
    answer = inverse.apply(given_rows).flat()
    assert gap(answer, solved(matrix, 0.1, given_rows.flat())) < 1e-10
    assert inverse.stats["scale"] == scale
    fewer = attrs.evolve(solver, depth=40).solve_for(MatrixOperator(matrix), CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        got = fewer.apply(given_rows).flat()
    # A direction of eigenvalue mu is solved to (1 - (mu + damping) / scale)^t, t = 41 products.
    values, basis = torch.linalg.eigh(matrix)
    solved_part = 1 - (1 - (values + 0.1) / scale) ** 41
    want = (given_rows.flat() @ basis * solved_part / (values + 0.1)) @ basis.mT
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    left = (got @ (matrix + 0.1 * torch.eye(8)) - given_rows.flat()).norm(dim=1)
    worst = float((left / given_rows.flat().norm(dim=1)).max())
    assert worst <= fewer.stats["residual"] <= 2 * worst


def test_one_product_a_step_for_all_rows_and_few_to_find_the_scale():
    matrix = symmetric(torch.linspace(0.5, 5, 12), 1)
    operator = MatrixOperator(matrix)
    inverse = LiSSA(damping=0.1, batch=None, depth=25).solve_for(operator, CPU)
    inverse.apply(rows(12, 7))
    assert operator.products == 8 + 25
    assert operator.vectors == 8 + 25 * 7
    assert 5.1 <= inverse.stats["scale"] <= 1.2 * 5.1
    inverse.with_damping(Damping(0.5)).apply(rows(12, 7))
    assert operator.products == 8 + 2 * 25  # the scale is known


def test_a_far_residual_is_warned_about():
    matrix = symmetric(torch.logspace(-4, 1, 8), 1)
    inverse = LiSSA(damping=1e-4, batch=None, depth=10).solve_for(MatrixOperator(matrix), CPU)
    with pytest.warns(ConvergenceWarning, match=r"after 10 steps.*more depth"):
        inverse.apply(rows(8))


# --- divergence -----------------------------------------------------------------------------------
def test_a_negative_eigenvalue_is_an_error_as_soon_as_it_shows():
    matrix = symmetric(torch.tensor([-1.0, 0.5, 1.0, 2.0, 3.0]), 1)
    operator = MatrixOperator(matrix)
    inverse = LiSSA(damping=0.1, batch=None, depth=5000).solve_for(operator, CPU)
    with pytest.raises(NumericsError, match=r"diverges from step \d+ on.*'ggn', or a larger scale"):
        inverse.apply(rows(5))
    assert operator.products < 30
    # More damping cures it.
    calm = LiSSA(damping=1.5, batch=None, depth=5000).solve_for(operator, CPU)
    assert gap(calm.apply(rows(5)).flat(), solved(matrix, 1.5, rows(5).flat())) < 1e-10


def test_a_scale_too_small_is_an_error_as_soon_as_it_shows():
    matrix = symmetric(torch.linspace(0.5, 5, 8), 1)
    operator = MatrixOperator(matrix)
    inverse = LiSSA(batch=None, depth=5000, scale=2.4).solve_for(operator, CPU)
    with pytest.raises(NumericsError, match=r"scale 2.4.*above twice the scale"):
        inverse.apply(rows(8))
    assert operator.products < 30
    stable = LiSSA(batch=None, depth=5000, scale=2.6).solve_for(MatrixOperator(matrix), CPU)
    assert gap(stable.apply(rows(8)).flat(), solved(matrix, 1e-3, rows(8).flat())) < 1e-8


def test_samples_that_diverge_are_an_error_long_before_they_overflow():
    operator = squares()
    inverse = LiSSA(batch=2, depth=100_000, scale=0.5).solve_for(operator, CPU)
    with pytest.raises(NumericsError, match=r"diverged by step \d+ of repeat 1.*larger batch"):
        inverse.apply(rows(6))
    assert len(operator.drawn) <= 21


def test_numbers_that_are_not_finite_are_refused():
    flat = rows(4).flat()
    flat[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="right-hand side is not finite"):
        LiSSA(batch=None, scale=2.0).solve_for(MatrixOperator(torch.eye(4)), CPU).apply(
            rows_of(flat)
        )
    bad = MatrixOperator(torch.full((4, 4), float("nan")).double())
    with pytest.raises(NumericsError, match="diverges from step 1"):
        LiSSA(batch=None, scale=2.0).solve_for(bad, CPU).apply(rows(4))
    with pytest.raises(NumericsError, match="not finite"):
        LiSSA(batch=None).solve_for(bad, CPU).apply(rows(4))


# --- on samples -----------------------------------------------------------------------------------
def recursion(operator, flat, damping, scale, depth, batch, repeats, seed):
    """Return the mean over repeats of v_depth / scale, drawn as the solver says it draws."""
    total = torch.zeros_like(flat)
    stream = RandomStream(seed, "curvature")
    for repeat in range(repeats):
        v = flat
        for step in range(depth):
            generator = stream.generator("lissa", repeat, step)
            index = torch.randint(operator.n_train, (batch,), generator=generator)
            damped = operator.matrices[index].mean(0) + damping * torch.eye(flat.shape[1]).double()
            v = flat + v - v @ damped / scale
        total = total + v / scale
    return total / repeats


@pytest.mark.parametrize(("batch", "repeats"), [(1, 1), (4, 1), (4, 3)])
def test_samples_follow_the_published_recursion(batch, repeats):
    operator = squares()
    operator.seed = 5
    given_rows = rows(6)
    solver = LiSSA(damping=0.2, batch=batch, repeats=repeats, depth=30, scale=25.0)
    inverse = solver.solve_for(operator, CPU)
    want = recursion(operator, given_rows.flat(), 0.2, 25.0, 30, batch, repeats, seed=5)
    torch.testing.assert_close(inverse.apply(given_rows).flat(), want, rtol=1e-11, atol=1e-12)
    assert len(operator.drawn) == 30 * repeats
    assert {count for count, _ in operator.drawn} == {3}  # all rows in one product
    assert {len(index) for _, index in operator.drawn} == {batch}
    assert inverse.stats["iterations"] == 30
    assert "residual" not in inverse.stats


def test_the_mean_of_many_runs_is_the_inverse():
    operator = squares(count=30, size=4)
    given_rows = rows(4, 1)
    solver = LiSSA(damping=1.0, batch=4, depth=50, repeats=400)
    got = solver.solve_for(operator, CPU).apply(given_rows).flat()
    want = solved(operator.matrices.mean(0), 1.0, given_rows.flat())
    one = attrs.evolve(solver, repeats=1).solve_for(operator, CPU).apply(given_rows).flat()
    assert gap(got, want) < 0.02 < gap(one, want)


def test_draws_depend_on_the_seed_alone():
    given_rows = rows(6, 5)
    solver = LiSSA(damping=0.5, batch=3, depth=50)
    whole = solver.solve_for(squares(), CPU).apply(given_rows).flat()
    # Neither on the rows that are asked for together, nor on the memory, nor on global state.
    alone = solver.solve_for(squares(), CPU).apply(given_rows.take(slice(2, 3))).flat()
    torch.testing.assert_close(alone, whole[2:3], rtol=1e-12, atol=1e-14)
    tight = squares()
    tight.memory = 6 * 6 * 8 * 2
    torch.testing.assert_close(
        solver.solve_for(tight, CPU).apply(given_rows).flat(), whole, rtol=1e-12, atol=1e-14
    )
    assert {count for count, _ in tight.drawn} == {1, 2}
    torch.manual_seed(99)
    assert torch.equal(solver.solve_for(squares(), CPU).apply(given_rows).flat(), whole)
    other = squares()
    other.seed = 1
    assert not torch.allclose(solver.solve_for(other, CPU).apply(given_rows).flat(), whole)


def test_rows_are_summed_in_pieces_whose_memory_is_reused(monkeypatch):
    given_rows = rows(6, 20)
    solver = LiSSA(damping=0.5, batch=3, depth=50)
    whole, parted = squares(), squares()
    want = solver.solve_for(whole, CPU).apply(given_rows).flat()
    assert max(count for count, _ in whole.drawn) == 20
    largest = max(spec.size for spec in given_rows.space) * 8
    monkeypatch.setattr(pages, "REUSED", 9 * largest)
    got = solver.solve_for(parted, CPU).apply(given_rows).flat()
    assert max(count for count, _ in parted.drawn) == 7
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_factors_half_precision_and_scales_of_rows():
    operator, given_rows = squares(), rows(6)
    solver = LiSSA(damping=0.5, batch=4, depth=100)
    want = solver.solve_for(operator, CPU).apply(given_rows).flat()
    got = solver.solve_for(operator, CPU).apply(factored(given_rows)).flat()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    narrow = solver.solve_for(operator, CPU).apply(given_rows.to(dtype=torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    assert gap(narrow.flat().double(), want) < 1e-2
    single = squares()
    single.dtype = torch.float32
    for scale in (1e-25, 1e25):
        small = rows_of((given_rows.flat() * scale).float())
        answer = solver.solve_for(single, CPU).apply(small).flat().double() / scale
        assert gap(answer, want) < 1e-4


# --- an estimated scale that is too small ---------------------------------------------------------
def outlier(count=40, size=6, weight=30.0):
    """Return an operator of alike examples but one, whose eigenvalue is by far the largest."""
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.rand(count, size, generator=generator, dtype=torch.float64)
    diagonal[:, 0] = 0.0
    diagonal[17] = 0.0
    diagonal[17, 0] = weight
    return MeanOperator(torch.diag_embed(diagonal))


def widened(operator, flat, solver, scale):
    """Return the series of every row at the first of scale, 2 scale, ... that bounds it."""
    answers, scales = [], []
    for row in flat:
        for factor in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0):
            unit = row / row.norm()
            steps = [
                recursion(operator, unit[None], 0.5, scale * factor, t, solver.batch, 1, seed=0)
                for t in (*range(1, solver.depth, 10), solver.depth)
            ]
            lengths = [scale * factor * float(v.norm()) for v in steps]
            looks = (*range(1, solver.depth, 10), solver.depth)
            if all(a <= 1.001 * (t + 1) for a, t in zip(lengths, looks, strict=True)):
                answers.append(steps[-1][0] * row.norm())
                scales.append(scale * factor)
                break
    return torch.stack(answers), scales


def test_rows_that_diverge_at_an_estimated_scale_are_summed_at_twice_it():
    operator = outlier()
    flat = rows(6, 6).flat()
    flat[:, 0] = torch.tensor([5.0, 0.5, 0.0, 0.0, 0.0, 0.0])  # four never see the outlier
    solver = LiSSA(damping=0.5, batch=2, depth=80)
    inverse = solver.solve_for(operator, CPU)
    with pytest.warns(ConvergenceWarning, match=r"\d of 6 rows diverged at the.* give scale="):
        got = inverse.apply(rows_of(flat)).flat()
    base = inverse.stats["scale"]
    assert base < 2  # the outlier is in none of the samples that were probed
    want, scales = widened(operator, flat, solver, base)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert len(want) == 6
    assert inverse.stats["widened"] == sum(scale > base for scale in scales) > 0
    assert inverse.stats["widest_scale"] == max(scales) > base
    assert base in scales  # the others keep theirs
    for k in range(6):  # each row for itself, whatever it comes with
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            alone = solver.solve_for(operator, CPU).apply(rows_of(flat[k : k + 1])).flat()
        torch.testing.assert_close(alone[0], got[k], rtol=1e-10, atol=1e-13)


def test_a_run_that_diverges_in_a_later_repeat_starts_over():
    operator = outlier(weight=60.0)
    flat = rows(6, 4).flat()
    found = set()
    for seed in range(12):
        operator.seed = seed
        solver = LiSSA(damping=0.5, batch=2, depth=12, repeats=3)
        inverse = solver.solve_for(operator, CPU)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            got = inverse.apply(rows_of(flat)).flat()
        scales = [inverse.stats["scale"] * 2**k for k in range(7)]
        each = [recursion(operator, flat, 0.5, s, 12, 2, 3, seed) for s in scales]
        gaps = torch.stack([(got - want).norm(dim=1) for want in each]) / got.norm(dim=1)
        assert float(gaps.min(0).values.max()) < 1e-10  # one scale through all repeats of a row
        used = gaps.argmin(0)
        assert inverse.stats.get("widened", 0) == int((used > 0).sum())
        found |= set(used.tolist())
    assert len(found) > 1


def test_negative_curvature_is_no_matter_of_the_scale():
    operator = squares()
    operator.matrices -= 3.0 * torch.eye(6, dtype=torch.float64)
    inverse = LiSSA(damping=0.1, batch=10, depth=2000).solve_for(operator, CPU)
    message = r"diverged by step \d+ of repeat 1 .* scale (\S+): .* negative"
    with pytest.raises(NumericsError, match=message) as caught:
        inverse.apply(rows(6))
    said = re.search(message, str(caught.value))
    assert said is not None
    largest = 1.1 * (inverse.largest_eigenvalue + 0.1)
    assert float(said[1]) == pytest.approx(largest, rel=1e-2)  # and not twice that


def test_a_scale_that_was_given_is_kept():
    operator = outlier()
    with pytest.raises(NumericsError, match=r"diverged by step \d+ of repeat 1.*scale 2"):
        LiSSA(damping=0.5, batch=2, depth=200, scale=2.0).solve_for(operator, CPU).apply(rows(6))


# --- as a method ----------------------------------------------------------------------------------
def test_no_batch_of_the_engine_shows():
    task, train, test = world(n_train=40)
    method = dattri.method("if-lissa", damping=0.3, batch=8, depth=60)
    want = method.attribute(task, train, test).values
    torch.testing.assert_close(
        method.attribute(task, train, test, memory="1MiB").values, want, rtol=1e-10, atol=1e-11
    )
    seeded = dattri.method("if-lissa", damping=0.3, batch=8, depth=60, seed=1)
    assert not torch.allclose(seeded.attribute(task, train, test).values, want)
    some = tuple(part[2:4] for part in test)
    torch.testing.assert_close(
        method.attribute(task, train, some).values, want[:, 2:4], rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("batch", [None, 20])
def test_on_a_network_it_nears_the_explicit_inverse(batch):
    task, train, test = dattri.Task(mlp((4, 5, 3))), examples(60), examples(5, seed=300)
    explicit = dattri.method("if-explicit", curvature="ggn", damping=0.3)
    want = explicit.attribute(task, train, test).values
    method = dattri.method("if-lissa", damping=0.3, batch=batch, depth=400)
    scores = method.attribute(task, train, test)
    assert gap(scores.values, want) < (1e-10 if batch is None else 0.2)
    assert scores.provenance["solver"][0]["scale"] > 0.3


def test_needs_and_fields():
    assert LiSSA(batch=None).needs == {"apply"}
    assert LiSSA().needs == {"apply", "sampled"}
    space = matrix_space(4)
    assert {"apply", "sampled"} <= GGN().gives(space) & Hessian().gives(space)
    with pytest.raises(SpecError, match="2 repeats on the whole train set"):
        LiSSA(batch=None, repeats=2).check(space)
    wrong = (
        {"depth": 0},
        {"repeats": 0},
        {"batch": 0},
        {"scale": 0.0},
        {"scale": float("inf")},
        {"damping": -1.0},
    )
    for changes in wrong:
        with pytest.raises(ValueError, match=next(iter(changes))):
            LiSSA(**changes)
    with pytest.raises(SpecError, match="inverse Hessian: the spaces"):
        LiSSA(batch=None).solve_for(MatrixOperator(torch.eye(4)), CPU).apply(rows(5))


def test_a_curvature_without_samples_is_refused_up_front():
    with pytest.raises(SpecError, match=r"needs \['sampled'\]"):
        dattri.Method(inverse_hessian={"curvature": "kfac", "solver": "lissa"})
