"""Principal directions of the Kronecker sketch: eigenvectors of moments that are written down."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from attrs import evolve
from dattri_parts.projectors.kronecker import Kronecker
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.toy_parts import CountingSource
from oracles.toy_tasks import examples, labels, mlp, normal, states, world
from torch import nn

from dattri_core import (
    BlockSpec,
    DenseBlock,
    MemoryBudgetError,
    Method,
    NumericsError,
    OneHot,
    OuterBlock,
    RandomStream,
    Rows,
    Space,
    SpecError,
    Task,
)
from dattri_core.laws import check
from dattri_core.laws.spaces import SPACE, ToyProblem, formed, toy_rows


def pca(rank, **fields):
    return Kronecker(rank, initialisation="pca", **fields)


def matrix(mapped, name, side):
    return mapped.sides[name, side].matrix


def leading(moment, rank):
    """Return the orthogonal projection onto the eigenvectors of the largest eigenvalues."""
    values, vectors = torch.linalg.eigh(moment)
    assert float(values[-rank] - values[-rank - 1]) > 1e-6  # else there is no such subspace
    return vectors[:, -rank:] @ vectors[:, -rank:].T


def subspace(mapped, name, side):
    p = matrix(mapped, name, side)
    assert (p @ p.T - torch.eye(len(p), dtype=torch.float64)).abs().max() < 1e-12
    assert bool((p.gather(1, p.abs().argmax(1, keepdim=True)) > 0).all())
    return p.T @ p


def factors(model, batch):
    """Return inputs with the bias's 1, and output gradients, of both linear layers of the MLP."""
    model = mlp() if model is None else model
    inputs, labels = batch
    first = model[0](inputs)
    hidden = torch.tanh(first)
    second = model[2](hidden)
    loss = nn.functional.cross_entropy(second, labels, reduction="sum")
    grads = torch.autograd.grad(loss, (first, second))
    ones = torch.ones(len(inputs), 1, dtype=inputs.dtype)
    return {
        "0": (torch.cat([inputs, ones], 1), grads[0]),
        "2": (torch.cat([hidden.detach(), ones], 1), grads[1]),
    }


def fitted_map(method, task, train):
    return method.fit(task, train)._held.chain.maps[0]


@pytest.mark.parametrize("rank", [1, 2])
def test_directions_are_the_leading_eigenvectors_of_both_moments(rank):
    task, train, _ = world(40)
    mapped = fitted_map(Method(projector=pca(rank)), task, train)
    for name, (x, e) in factors(task.model, train).items():
        assert (subspace(mapped, name, "inputs") - leading(x.T @ x, rank)).abs().max() < 1e-10
        assert (subspace(mapped, name, "outputs") - leading(e.T @ e, rank)).abs().max() < 1e-10


@pytest.mark.parametrize("fields", [{"rank": 2}, {"rank": 1, "uncovered": "sketch"}])
def test_it_meets_every_law_of_projectors(fields):
    report = check("projector", pca(**fields))
    assert report.ok, str(report)
    assert report.count("skipped") == 2  # that of additive maps, and that of random ones


@pytest.mark.parametrize("rank", [3, 4])
def test_a_rank_that_holds_the_train_set_keeps_its_inner_products(rank):
    """Three train rows lie in three directions a side; a fourth one is zero, not arbitrary."""
    task, train, test = world(3, 6)
    method = Method(projector=pca(100, rank_in=rank))
    plain = Method().attribute(task, train, train).values
    assert (method.attribute(task, train, train).values - plain).abs().max() < 1e-10
    mapped = fitted_map(method, task, train)
    assert bool((matrix(mapped, "0", "inputs")[3:] == 0).all())
    three = Method(projector=pca(100, rank_in=3)).attribute(task, train, test).values
    assert (method.attribute(task, train, test).values - three).abs().max() < 1e-12


def test_inputs_near_a_plane_are_kept_by_principal_directions_and_not_by_random_ones():
    """Inputs of 20 numbers, 1e-3 off a plane: with the bias they have three directions."""
    plane, noise = normal(2, 20, seed=1), 1e-3

    def data(count, seed):
        near = normal(count, 2, seed=seed) @ plane + noise * normal(count, 20, seed=seed + 1)
        return near, labels(count, 3, seed=seed)

    task = Task(mlp((20, 5, 3)), parameters="0.*")
    train, test = data(60, 2), data(20, 4)
    exact = Method().attribute(task, train, test).values
    gaps = []
    for initialisation in ("pca", "random"):
        sketch = Kronecker(100, rank_in=3, initialisation=initialisation)
        got = Method(projector=sketch).attribute(task, train, test).values
        gaps.append(float((got - exact).norm() / exact.norm()))
    assert gaps[0] < 10 * noise < 0.1 < gaps[1]


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=6),
    rank=st.integers(1, 9),
)
def test_of_an_embedding_they_are_the_most_frequent_words(tokens, rank):
    space = Space((BlockSpec("words", "outer", (2, 10)),))
    outputs = torch.ones(len(tokens), 3, 2, dtype=torch.float64)
    outputs[0, 2] = 0  # a padded position: it has no gradient and does not count
    block = OuterBlock(outputs, OneHot(torch.tensor(tokens), 10))
    problem = ToyProblem(Rows(space, {"words": block}, torch.arange(len(tokens))), batch=2)
    mapped = pca(100, rank_in=rank).fit(problem)
    counts = Counter(word for row in tokens for word in row)
    counts[tokens[0][2]] -= 1
    order = sorted(range(10), key=lambda word: (-counts[word], word))[:rank]
    want = torch.zeros(rank, 10, dtype=torch.float64)
    for k, word in enumerate(order):
        want[k, word] = float(counts[word] > 0)
    assert torch.equal(matrix(mapped, "words", "inputs"), want)


def test_rows_without_factors_are_sketched_by_moments_of_their_matrices():
    task, train, _ = world(30)
    method = Method(source="functional", projector=pca(2, uncovered="sketch"))
    mapped = fitted_map(method, task, train)
    rows = torch.stack(
        [
            torch.autograd.grad(loss, task.model[0].weight, retain_graph=True)[0]
            for loss in nn.functional.cross_entropy(
                task.model(train[0]), train[1], reduction="none"
            )
        ]
    )
    inputs = torch.einsum("boi,boj->ij", rows, rows)
    outputs = torch.einsum("boi,bpi->op", rows, rows)
    assert (subspace(mapped, "0.weight", "inputs") - leading(inputs, 2)).abs().max() < 1e-10
    assert (subspace(mapped, "0.weight", "outputs") - leading(outputs, 2)).abs().max() < 1e-10
    kept = fitted_map(Method(source="functional", projector=pca(2)), task, train)
    assert kept.sides == {}


def test_passes_are_as_many_as_the_memory_asks_for_and_do_not_show():
    rows = toy_rows(9, seed=20)

    class Counting(ToyProblem):
        passes = 0

        def stream(self, sink, **kind):
            type(self).passes += 1
            super().stream(sink, **kind)

    want = pca(2).fit(ToyProblem(rows))
    # linear: 3^2 + 5^2 numbers of 8 bytes, three times; embedding: 2^2 + 6
    for memory, passes in ((2**20, 1), (2 * 3 * 8 * 34, 2)):
        Counting.passes = 0
        problem = Counting(rows)
        Counting.memory = memory
        got = pca(2).fit(problem)
        assert Counting.passes == passes
        for key, side in want.sides.items():
            assert torch.equal(got.sides[key].matrix, side.matrix)
    Counting.memory = 2 * 3 * 8 * 34 - 2
    with pytest.raises(MemoryBudgetError, match=r"block 'linear' of shape \(3, 5\).*816 B.*random"):
        pca(2).fit(Counting(rows))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_neither_batches_nor_the_budget_show_in_scores(dtype):
    task, train, test = world(200, 6, dtype=dtype)
    method = Method(projector=pca(2))
    whole = method.attribute(task, train, test).values
    tight = method.attribute(task, train, test, memory="1MiB").values
    scale = float(whole.abs().max())
    assert (whole - tight).abs().max() < (1e-10 if dtype == torch.float64 else 1e-4) * scale


def test_every_checkpoint_has_its_own_directions():
    train, test = examples(20), examples(5, seed=9)
    weights = states(2)
    method = Method(projector=pca(2))
    single = [method.attribute(Task(mlp(), checkpoints=[w]), train, test).values for w in weights]
    whole = method.attribute(Task(mlp(), checkpoints=weights), train, test).values
    assert (whole - sum(single) / 2).abs().max() < 1e-12


@pytest.mark.parametrize(
    "inverse", [None, {"curvature": "ggn", "solver": {"name": "cholesky", "damping": 0.1}}]
)
def test_a_dry_run_reads_a_few_examples_and_plans_what_the_run_does(inverse, monkeypatch):
    from dattri_core.fitted import FittedMethod

    counts = Counter()
    task, train, test = world(200, 40)
    method = Method(
        source=CountingSource(counts), projector=pca(2), inverse_hessian=inverse or "identity"
    )
    plan = method.attribute(task, train, test, dry_run=True, memory="1MiB")
    assert counts["train"] < 20
    used, original = [], FittedMethod._plan

    def keep(self, *arguments):
        used.append(original(self, *arguments))
        return used[-1]

    monkeypatch.setattr(FittedMethod, "_plan", keep)
    method.attribute(task, train, test, memory="1MiB")
    assert used == [plan]


def test_curvature_follows_in_the_principal_subspace():
    """CG on the lifted Hessian equals the explicit inverse behind fitted directions too."""
    task, train, test = world()
    solvers = (
        {"name": "cholesky", "damping": 2.0},
        {"name": "cg", "damping": 2.0, "tolerance": 1e-14, "maximum_iterations": 200},
    )
    one, two = (
        Method(projector=pca(2), inverse_hessian={"curvature": "hessian", "solver": solver})
        .attribute(task, train, test)
        .values
        for solver in solvers
    )
    assert (one - two).abs().max() < 1e-10
    fitted = Method(
        projector=pca(2), inverse_hessian={"curvature": "hessian", "solver": solvers[0]}
    ).fit(task, train)
    swept = fitted.with_(damping=3.0)
    assert swept._held.chain.maps[0] is fitted._held.chain.maps[0]
    own = fitted.self_influence()
    assert (own - fitted.attribute(train).values.diagonal()).abs().max() < 1e-10


# --- refused --------------------------------------------------------------------------------------
def test_rows_that_came_formed_have_no_factors_to_decompose():
    problem = ToyProblem(formed(toy_rows(5)))
    with pytest.raises(SpecError, match="have no factors; take a source that keeps them"):
        pca(2).fit(problem)


def test_a_moment_that_is_not_finite_is_refused():
    rows = toy_rows(5)
    rows = rows.map_blocks(
        lambda name, block: (
            block.scale(torch.full((5,), float("inf"))) if name == "linear" else block
        )
    )
    with pytest.raises(NumericsError, match=r"moment of the (in|out)puts of block 'linear'"):
        pca(2).fit(ToyProblem(rows))


def test_inputs_that_are_words_in_some_batches_only_are_refused():
    rows = toy_rows(8)
    words = rows.blocks["embedding"]
    dense = words.map(lambda x: x, None)
    mixed = [
        evolve(rows, blocks={**rows.blocks, "embedding": block}).take(slice(4 * at, 4 * at + 4))
        for at, block in enumerate((words, dense))
    ]

    class Mixed(ToyProblem):
        def rows(self, index=None, **kind):
            return iter(mixed)

    with pytest.raises(SpecError, match="'embedding' has one-hot inputs in some batches"):
        pca(2).fit(Mixed(rows))


def test_it_is_fitted_and_not_built():
    part = pca(2)
    assert part.needs == {"rows"}
    with pytest.raises(SpecError, match=r"fitted on the train set, not built.*fit\(problem\)"):
        part.build(SPACE, stream=RandomStream(0, "test"), device=torch.device("cpu"))
    random = Kronecker(2)
    assert random.needs == frozenset()
    problem = ToyProblem(toy_rows(5), seed=4)
    built = random.build(SPACE, stream=RandomStream(4, "law"), device=torch.device("cpu"))
    for key, side in random.fit(problem).sides.items():
        assert torch.equal(side.matrix, built.sides[key].matrix)


def test_a_vector_is_sketched_as_a_matrix_of_one_column():
    rows = toy_rows(3)
    assert isinstance(rows.blocks["scale"], DenseBlock)
    mapped = pca(2, uncovered="sketch").fit(ToyProblem(rows))
    assert matrix(mapped, "scale", "outputs").shape == (2, 4)
