"""Both sides of Woodbury's identity against dense solves in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from attrs import define
from dattri_parts.curvatures.fisher_information import Fisher
from dattri_parts.curvatures.gauss_newton import GaussNewton
from dattri_parts.curvatures.ggn import GGN
from dattri_parts.solvers import dual, woodbury
from dattri_parts.solvers.cholesky import Cholesky
from dattri_parts.solvers.factor import require_regular
from dattri_parts.solvers.woodbury import Woodbury
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.networks import (
    NETWORKS,
    dense_ggn,
    dense_second_moment,
    diagonal_blocks,
    network,
    problem_of,
    solved,
)
from oracles.toy_parts import FlatSketch, OneWaySketch
from torch import nn

import dattri_core as dattri
from dattri_core import (
    Damping,
    MemoryBudgetError,
    NumericsError,
    Rows,
    SpanBlock,
    SpecError,
    SumBlock,
)
from dattri_core.testing import PeakMemory

CPU = torch.device("cpu")


def queries(name, count=5, seed=9, dtype=torch.float64):
    """Return factored rows that are no train rows."""
    return Rows.concatenate(list(problem_of(*network(name, count, seed, dtype)).rows()))


def gap(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def inverted(curvature, problem, damping=0.01):
    return Woodbury(damping).solve_for(curvature.fit(problem), CPU)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_equals_a_dense_solve_of_the_named_curvature(name, damping):
    task, train = network(name)
    problem = problem_of(task, train)
    rows = queries(name)
    moment = dense_second_moment(task, problem.space, train)
    cases = [
        (GGN(), dense_ggn(task, problem.space, train)),
        (GaussNewton(), moment),
        (Fisher(kind="empirical"), moment),
        (Fisher(draws=3), Fisher(draws=3).fit(problem).dense()),
    ]
    train_rows = Rows.concatenate(list(problem.rows()))
    for curvature, matrix in cases:
        inverse = inverted(curvature, problem, damping)
        answer = inverse.apply(rows)
        want = solved(matrix, damping, rows.flat())
        assert gap(answer.flat(), want) < 1e-8, curvature
        assert gap(train_rows.inner(answer), train_rows.flat() @ want.T) < 1e-8, curvature
        assert torch.equal(answer.index, rows.index)
        assert inverse.stats["damping"] == damping
        assert inverse.stats["dual_blocks"] == 1
        explicit = Cholesky(damping).solve_for(curvature.fit(problem), CPU).apply(rows)
        assert gap(answer.flat(), explicit.flat()) < 1e-8, curvature


@pytest.mark.parametrize("n", [3, 8, 40])  # the smaller side is that of rows, mixed, of numbers
@pytest.mark.parametrize("name", NETWORKS)
def test_blockwise_equals_a_dense_solve_of_the_diagonal_blocks(name, n):
    task, train = network(name, n)
    problem = problem_of(task, train)
    rows = queries(name)
    matrix = diagonal_blocks(dense_second_moment(task, problem.space, train), problem.space)
    for curvature in (GaussNewton(block=True), Fisher(kind="empirical", block=True)):
        inverse = inverted(curvature, problem)
        assert inverse.blockwise
        want = solved(matrix, 0.01, rows.flat())
        assert gap(inverse.apply(rows).flat(), want) < 1e-8
        some = rows.select(problem.space.names[1:3])
        alone = inverse.apply(some)
        for spec in some.space:
            at = problem.space.offsets[spec.name]
            assert gap(alone.blocks[spec.name].flat(), want[:, at : at + spec.size]) < 1e-8
    small = sum(1.5 * spec.size <= n for spec in problem.space)
    assert inverse.stats["dual_blocks"] == len(problem.space) - small


@pytest.mark.parametrize("curvature", [GaussNewton(), GGN(), Fisher(draws=2)])
@pytest.mark.parametrize("sketch", [FlatSketch(6), OneWaySketch(6)])
def test_in_a_sketch_the_matrix_itself_is_the_smaller_side(curvature, sketch):
    task, train = network("perceptron", 10)
    problem = problem_of(task, train, sketches=[sketch])
    moment = torch.zeros(6, 6, dtype=torch.float64)
    operator = curvature.fit(problem)
    for rows in operator.rows():
        moment += operator.weight * rows.flat().T @ rows.flat()
    rows = Rows.concatenate(list(problem.rows()))
    inverse = inverted(curvature, problem)
    assert inverse.stats["dual_blocks"] == 0
    assert gap(inverse.apply(rows).flat(), solved(moment, 0.01, rows.flat())) < 1e-9
    changed = inverse.with_damping(Damping(0.5)).apply(rows).flat()
    assert gap(changed, solved(moment, 0.5, rows.flat())) < 1e-9


def test_a_ggn_of_rows_needs_no_adjoint_of_a_sketch():
    sketched = {"projector": OneWaySketch(6)}
    with pytest.raises(SpecError, match="no adjoint"):
        dattri.Method(**sketched, inverse_hessian={"curvature": "ggn", "solver": "cg"})
    method = dattri.Method(**sketched, inverse_hessian={"curvature": "ggn", "solver": "woodbury"})
    assert method.inverse_hessian.needs == {"ggn-rows"}


@define
class Counting:
    """An operator that counts how often its rows are read."""

    operator: object
    passes: int = 0

    def __getattr__(self, name):
        return getattr(self.operator, name)

    def rows(self):
        self.passes += 1
        return self.operator.rows()


class Plain:
    """A rows operator whose rows cannot be read by example."""

    def __init__(self, operator):
        self.space, self.dtype, self.memory = operator.space, operator.dtype, operator.memory
        self.weight, self.blockwise, self.rows = operator.weight, operator.blockwise, operator.rows


# --- dampings -----------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(
    dampings=st.lists(st.sampled_from([1e-3, 0.1, 3.0]), min_size=1, max_size=5),
    block=st.booleans(),
    eigenvectors=st.booleans(),
)
def test_a_sweep_of_dampings_equals_fresh_solves(dampings, block, eigenvectors):
    task, train = network("perceptron", 10)
    problem = problem_of(task, train)
    rows = queries("perceptron")
    curvature = GaussNewton(block=block)
    operator = Counting(curvature.fit(problem))
    small = woodbury.SMALL
    try:
        woodbury.SMALL = small if eigenvectors else 0
        first = Woodbury(0.05).solve_for(operator, CPU)
        assert isinstance(first, dattri.SharingInverse)
        before = first.apply(rows).flat()
        inverses = [first.with_damping(Damping(d)) for d in dampings]
        matrix = dense_second_moment(task, problem.space, train)
        if block:
            matrix = diagonal_blocks(matrix, problem.space)
        for damping, inverse in zip(dampings, inverses, strict=True):
            assert inverse.stats["damping"] == damping
            assert inverse.spectral == eigenvectors
            want = solved(matrix, damping, rows.flat())
            assert gap(inverse.apply(rows).flat(), want) < 1e-8
        for inverse, answer in zip(inverses, first.apply_each(rows, inverses), strict=True):
            assert gap(answer.flat(), inverse.apply(rows).flat()) < 1e-9
        assert torch.equal(first.apply(rows).flat(), before)  # bit for bit
        assert operator.passes == 1  # nothing is read again
    finally:
        woodbury.SMALL = small


@pytest.mark.parametrize("n", [3, 40])  # the smaller side is that of rows, of numbers
def test_answers_at_several_dampings_meet_the_rows_of_the_curvature_once(n, monkeypatch):
    """And lie in the span of one base, so that train rows meet it once for all of them."""
    problem = problem_of(*network("perceptron", n))
    first = inverted(GaussNewton(block=True), problem)
    inverses = [first.with_damping(Damping(0.1 * k)) for k in range(1, 9)]
    met = []
    plain = dual.Dual._met
    monkeypatch.setattr(
        dual.Dual, "_met", lambda self, rows, names: met.append(names) or plain(self, rows, names)
    )
    rows = queries("perceptron")
    answers = first.apply_each(rows, inverses)
    assert len(met) == first.stats["dual_blocks"]
    for name in rows.space.names:
        blocks = [answer.blocks[name] for answer in answers]
        if isinstance(blocks[0], SumBlock):
            assert len({id(block.parts[1].base) for block in blocks}) == 1
    for answer, inverse in zip(answers, inverses, strict=True):
        assert gap(answer.flat(), inverse.apply(rows).flat()) < 1e-9


def test_eigenvectors_serve_all_dampings_after_a_few_factors(monkeypatch):
    monkeypatch.setattr(woodbury, "SMALL", 0)
    problem = problem_of(*network("perceptron"))
    inverse = inverted(GaussNewton(), problem)
    kinds = [inverse.with_damping(Damping(0.1 * k)).spectral for k in range(1, 11)]
    assert kinds == [False] * (woodbury.FACTORS - 1) + [True] * (11 - woodbury.FACTORS)


def test_relative_damping_multiplies_the_mean_eigenvalue_of_each_block():
    task, train = network("reader")
    problem = problem_of(task, train)
    rows = queries("reader")
    moment = dense_second_moment(task, problem.space, train)
    whole = inverted(GaussNewton(), problem, {"relative": 0.5})
    value = 0.5 * float(moment.trace()) / problem.space.dim
    assert whole.stats["damping"] == pytest.approx(value, rel=1e-12)
    assert gap(whole.apply(rows).flat(), solved(moment, value, rows.flat())) < 1e-8
    apart = inverted(GaussNewton(block=True), problem, {"relative": 0.5})
    answer, used = apart.apply(rows), []
    for spec in problem.space:
        at = slice(problem.space.offsets[spec.name], problem.space.offsets[spec.name] + spec.size)
        used.append(0.5 * float(moment[at, at].trace()) / spec.size)
        want = solved(moment[at, at], used[-1], rows.flat()[:, at])
        assert gap(answer.blocks[spec.name].flat(), want) < 1e-8
    sizes = [spec.size for spec in problem.space]
    mean = sum(u * n for u, n in zip(used, sizes, strict=True)) / sum(sizes)
    assert apart.stats["damping"] == pytest.approx(mean)
    assert apart.stats["damping_maximum"] == pytest.approx(max(used))
    assert apart.stats["damping_minimum"] == pytest.approx(min(used))


# --- batches, memory, precision -----------------------------------------------------------------
@pytest.mark.parametrize("tile", [2, 5, 2048])
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_neither_batches_nor_tiles_show(batch, tile, monkeypatch):
    rows = queries("images")
    want = inverted(GGN(), problem_of(*network("images"))).apply(rows).flat()
    monkeypatch.setattr(dual, "TILE", tile)
    problem = problem_of(*network("images"), batch=batch)
    assert gap(inverted(GGN(), problem).apply(rows).flat(), want) < 1e-11


def test_answers_are_rows_and_combinations_of_one_base():
    problem = problem_of(*network("perceptron"))
    inverse = inverted(GGN(), problem)
    one, two = inverse.apply(queries("perceptron")), inverse.apply(queries("perceptron", 3, 4))
    for name in problem.space.names:
        left, right = one.blocks[name], two.blocks[name]
        assert isinstance(left, SumBlock)
        assert isinstance(left.parts[1], SpanBlock)
        assert left.parts[1].base is right.parts[1].base  # held once, whatever asks


def wide(n_train=40, n_test=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(600, 500), nn.Tanh(), nn.Linear(500, 3)).to(dtype)
    sets = []
    for n in (n_train, n_test):
        inputs = torch.randn(n, 600, generator=generator).to(dtype)
        sets.append((inputs, torch.randint(3, (n,), generator=generator)))
    return dattri.Task(model), *sets


def test_scoring_makes_no_vector_of_the_size_of_the_parameters():
    task, train, test = wide()
    size = sum(p.numel() for p in task.model.parameters()) * 4  # 1.2 MB a vector
    method = dattri.method("if-woodbury", damping=0.1)
    fitted = method.fit(task, train, memory="64MiB")
    problem = problem_of(task, train, batch=40)
    inverse = inverted(GGN(), problem, 0.1)
    rows = Rows.concatenate(list(problem_of(task, test).rows()))
    with PeakMemory() as seen:
        answer = inverse.apply(rows)
        scores = Rows.concatenate(list(problem.rows())).inner(answer)
    assert seen.peak < size  # not one of six
    assert scores.shape == (40, 6)
    assert gap(fitted.attribute(test).values, scores) < 1e-3


def test_float32_agrees_with_float64_to_the_rounding_that_is_told():
    task, train, test = wide()
    exact, *sets = wide(dtype=torch.float64)
    sets = [(inputs.float().double(), labels) for inputs, labels in (train, test)]
    for damping in (1.0, 1e-3):
        method = dattri.method("if-woodbury", damping=damping)
        low = method.attribute(task, train, test)
        high = method.attribute(exact, *sets)
        told = low.provenance["solver"][0]["rounding"]
        assert 1e-8 < told < 1e-2
        rows = [Rows.concatenate(list(problem_of(exact, some, batch=40).rows())) for some in sets]
        lengths = [part.pair_inner(part).sqrt() for part in rows]
        allowed = 20 * told * lengths[0][:, None] * lengths[1] / damping
        assert bool(((low.values - high.values).abs() <= allowed).all())


def test_rows_that_are_rounding_of_the_largest_are_left_out():
    problem = problem_of(*network("perceptron", n=12))
    operator = GaussNewton().fit(problem)
    weights = torch.ones(12, dtype=torch.float64)
    weights[[2, 5, 7]] = 1e-9
    rows = Rows.concatenate(list(operator.rows()))

    class Scaled:
        space, dtype, memory, weight, blockwise = problem.space, torch.float64, 2**28, 0.1, False

        def rows(self):
            yield rows.scale(weights)

    inverse = Woodbury(0.01).solve_for(Scaled(), CPU)
    assert inverse.stats["negligible_rows"] == 3
    flat = rows.flat() * weights[:, None]
    want = solved(0.1 * flat.T @ flat, 0.01, rows.flat())
    assert gap(inverse.apply(rows).flat(), want) < 1e-12


def test_more_than_the_memory_is_refused_with_the_bytes():
    problem = problem_of(*network("perceptron", n=40), memory=12 * 2**10)
    with pytest.raises(MemoryBudgetError, match=r"40 rows and what inverts them take .* KiB"):
        inverted(GaussNewton(), problem)
    with pytest.raises(MemoryBudgetError, match=r"after 27 rows.*of 27 x 27 5.7 KiB"):
        Woodbury(0.01).solve_for(Plain(GaussNewton().fit(problem)), CPU)
    held = inverted(GaussNewton(), problem_of(*network("perceptron", n=40)))
    assert held.stats["factor_bytes"] == 8 * 40**2
    assert 0 < held.stats["row_bytes"] < 40 * 60 * 8


def test_what_is_singular_is_refused_with_the_cure():
    problem = problem_of(*network("perceptron"))
    with pytest.raises(NumericsError, match=r"8 rows .* at most 8 of 60 directions; give damping"):
        inverted(GaussNewton(), problem, 0.0)
    with pytest.raises(NumericsError, match="singular to working precision"):
        inverted(GaussNewton(), problem, 1e-18)
    with pytest.warns(RuntimeWarning, match=r"far below the largest eigenvalue.*model.double"):
        inverted(GaussNewton(), problem, 1e-14)
    sketched = problem_of(*network("perceptron"), sketches=[FlatSketch(3)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inverted(GaussNewton(), sketched, 0.0).stats["damping"] == 0.0
    once = problem_of(*network("perceptron", 2), batch=1, sketches=[FlatSketch(1)])
    assert inverted(GaussNewton(), once, 0.0).stats["dual_blocks"] == 0


def test_the_cure_of_a_sum_of_squares_is_no_other_curvature():
    task, train, test = wide(dtype=torch.bfloat16)
    with pytest.raises(NumericsError, match=r"give a damping above .*, or model\.double") as told:
        dattri.attribute(task, train, test, method="if-woodbury", damping=1e-9)
    assert "'ggn'" not in str(told.value)
    with pytest.raises(NumericsError, match=r"give a damping above .*, or model\.double") as told:
        require_regular(1e-9, 1.0, 1e-3, 1e-9, squares=True)
    assert "'ggn'" not in str(told.value)


def test_rows_that_are_not_finite_and_other_spaces_are_refused():
    problem = problem_of(*network("perceptron"))
    rows = Rows.concatenate(list(problem.rows()))
    rows.blocks[problem.space.names[0]].outputs[0, 0, 0] = float("inf")

    class Broken:
        space, dtype, memory, weight, blockwise = problem.space, torch.float64, 2**28, 0.1, False

        def rows(self):
            yield rows

    with pytest.raises(NumericsError, match="not finite"):
        Woodbury().solve_for(Broken(), CPU)
    with pytest.raises(SpecError, match="inverse Hessian: the spaces differ"):
        inverted(GaussNewton(), problem).apply(queries("reader"))


def test_a_curvature_without_rows_is_damping_alone():
    class Nothing:
        space, dtype, memory, weight, blockwise = (
            queries("perceptron").space, torch.float64, 2**28, 0.1, False,
        )  # fmt: skip

        def rows(self):
            return iter(())

    rows = queries("perceptron")
    inverse = Woodbury(0.5).solve_for(Nothing(), CPU)
    assert gap(inverse.apply(rows).flat(), rows.flat() / 0.5) < 1e-12


def test_declared_facts_and_fields():
    assert Woodbury.needs == {"rows"}
    assert Woodbury.exact
    assert Woodbury(damping={"relative": 0.1}).damping == Damping(0.1, relative=True)
