"""The Kronecker sketch against the matrix P_out (x) P_in written down; its moments over seeds."""

from __future__ import annotations

import pytest
import torch
from dattri_parts.projectors.kronecker import Kronecker
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.devices import DEVICES
from oracles.toy_tasks import cross_entropies, dense_hessian, flat_gradients, positions, world

import dattri_core as dattri
from dattri_core import (
    BlockSpec,
    DenseBlock,
    Method,
    OneHot,
    OuterBlock,
    RandomStream,
    Rows,
    Space,
    SpecError,
)
from dattri_core.laws import check
from dattri_core.laws.spaces import SPACE, flat_rows, formed, toy_rows

CPU = torch.device("cpu")
VARIANTS = [
    {"rank": 2},
    {"rank": 2, "distribution": "normal"},
    {"rank": 1, "uncovered": "sketch"},
    {"rank_in": 2, "rank": 100, "uncovered": "drop"},
    {"rank": 100, "rank_out": 1, "uncovered": "sketch", "distribution": "normal"},
]


def build(part, space=SPACE, seed=0, checkpoint=0, device=CPU):
    stream = RandomStream(seed, "projector", checkpoint)
    return part.build(space, stream=stream, device=device)


def side(mapped, name, which, size):
    """Return P of one side, the identity where nothing is sketched."""
    held = mapped.sides.get((name, which))
    return torch.eye(size, dtype=torch.float64) if held is None else held.matrix


def dense(mapped, space=SPACE):
    """Return P ``[k, d]``: the Kronecker products of all blocks on the diagonal."""
    parts = []
    for spec in space:
        outputs, inputs = spec.matrix_shape
        if spec.name not in mapped.out_space:
            parts.append(torch.zeros(0, spec.size, dtype=torch.float64))
            continue
        left, right = (
            side(mapped, spec.name, which, size)
            for which, size in (("outputs", outputs), ("inputs", inputs))
        )
        parts.append(torch.kron(left, right))
    whole = torch.zeros(sum(len(p) for p in parts), space.dim, dtype=torch.float64)
    row = column = 0
    for part in parts:
        whole[row : row + len(part), column : column + part.shape[1]] = part
        row, column = row + len(part), column + part.shape[1]
    return whole


@pytest.mark.parametrize("fields", VARIANTS)
def test_it_meets_every_law_of_projectors(fields):
    report = check("projector", Kronecker(**fields))
    assert report.ok, str(report)
    assert report.count("skipped") == 2  # those of fitted projectors and of additive maps


@pytest.mark.parametrize("fields", VARIANTS)
@given(seed=st.integers(0, 99), count=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_map_and_adjoint_are_the_kronecker_product(fields, seed, count):
    mapped = build(Kronecker(**fields), seed=seed)
    matrix, rows = dense(mapped), toy_rows(count, seed=seed)
    for given_rows in (rows, formed(rows)):
        assert (mapped.map(given_rows).flat() - rows.flat() @ matrix.T).abs().sum() < 1e-10
    keys = flat_rows(mapped.out_space, count, seed=seed)
    raised = mapped.adjoint(keys)
    assert (raised.flat() - keys.flat() @ matrix).abs().sum() < 1e-10
    assert (mapped.map(raised).flat() - keys.flat() @ (matrix @ matrix.T)).abs().sum() < 1e-9
    again = mapped.map(rows)
    assert (mapped.adjoint(again).flat() - rows.flat() @ (matrix.T @ matrix)).abs().sum() < 1e-9


def test_ranks_are_those_of_the_fields_and_a_long_rank_is_the_identity():
    shapes = {
        (2, None, None): {"linear": (2, 2), "embedding": (2, 2), "scale": (4,)},
        (2, 5, None): {"linear": (2, 5), "embedding": (2, 5), "scale": (4,)},
        (6, 4, 1): {"linear": (1, 4), "embedding": (1, 4), "scale": (4,)},
        (1, 100, 100): {"linear": (3, 5), "embedding": (2, 6), "scale": (4,)},
    }
    for (rank, rank_in, rank_out), want in shapes.items():
        space = Kronecker(rank, rank_in=rank_in, rank_out=rank_out).out_space(SPACE)
        assert {spec.name: spec.shape for spec in space} == want
    sketched = Kronecker(3, uncovered="sketch").out_space(SPACE)
    assert (sketched["scale"].kind, sketched["scale"].shape) == ("dense", (3, 1))
    assert sketched["linear"].parameters == ()
    assert Kronecker(2, uncovered="drop").out_space(SPACE).names == ("linear", "embedding")
    assert Kronecker(6).out_space(SPACE) == SPACE  # parameters and all: no sketch at all
    rows = toy_rows(3)
    mapped = build(Kronecker(6)).map(rows)
    assert all(mapped.blocks[name] is rows.blocks[name] for name in SPACE.names)


def test_a_side_that_is_short_enough_is_not_touched():
    rows = toy_rows(3)
    mapped = build(Kronecker(100, rank_in=2)).map(rows)
    assert mapped.blocks["linear"].outputs is rows.blocks["linear"].outputs
    mapped = build(Kronecker(100, rank_out=1)).map(rows)
    assert mapped.blocks["embedding"].inputs is rows.blocks["embedding"].inputs  # still indices


def test_a_smaller_rank_is_the_top_of_a_larger_one():
    for distribution in ("signs", "normal"):
        small, large = (build(Kronecker(r, distribution=distribution)) for r in (1, 2))
        assert ("linear", "inputs") in small.sides
        for key, held in small.sides.items():
            top = large.sides[key].matrix[:1] * 2**0.5 if key in large.sides else held.matrix
            assert (held.matrix - top).abs().max() < 1e-15


def test_an_embedding_is_projected_without_its_one_hot_vectors(monkeypatch):
    monkeypatch.setattr(OneHot, "dense", lambda self, dtype: pytest.fail("was made dense"))
    space = Space((BlockSpec("words", "outer", (3, 50_000)),))
    index = torch.tensor([[4, 49_999, 4], [0, 17, 1]])
    outputs = torch.randn(2, 3, 3, dtype=torch.float64)
    rows = Rows(space, {"words": OuterBlock(outputs, OneHot(index, 50_000))}, torch.arange(2))
    mapped = build(Kronecker(100, rank_in=8), space)
    block = mapped.map(rows).blocks["words"]
    columns = mapped.sides["words", "inputs"].matrix[:, index]  # [r, B, T]
    assert torch.equal(block.inputs, columns.permute(1, 2, 0))
    assert block.positions == 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_sketch_is_the_same_in_every_batch_order_dtype_and_device(dtype, device):
    rows = toy_rows(6).to(device, dtype)
    mapped = build(Kronecker(2), device=torch.device(device))
    whole = mapped.map(rows).flat().cpu()
    assert whole.dtype == torch.promote_types(dtype, torch.float32)
    rounding = 40 * torch.finfo(whole.dtype).eps
    for size in (1, 2, 5):
        parts = [mapped.map(rows.take(slice(b, b + size))).flat().cpu() for b in range(0, 6, size)]
        assert (torch.cat(parts) - whole).abs().max() <= rounding
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    turned = mapped.map(rows.take(order.to(device))).flat().cpu()
    assert (turned - whole[order]).abs().max() <= rounding
    want = rows.to("cpu", torch.float64).flat() @ dense(build(Kronecker(2))).T
    assert (whole.double() - want).abs().max() <= rounding
    for other in (build(Kronecker(2), seed=1), build(Kronecker(2), checkpoint=1)):
        assert (other.map(rows.to("cpu")).flat() - whole).abs().max() > 0.1


# --- moments over seeds ---------------------------------------------------------------------------
SIZES, RANKS, SEEDS = (20, 30), (4, 6), 512


def one_position(kind):
    """Return two rows e x^T and e' x'^T, and their vectors [(e, e'), (x, x')]."""
    generator = torch.Generator().manual_seed(5)
    vectors = [torch.randn(2, size, generator=generator, dtype=torch.float64) for size in SIZES]
    if kind == "same":
        vectors = [v[:1].expand(2, -1) for v in vectors]
    if kind == "orthogonal":
        turned = [v[1] - v[0] * (v[0] @ v[1]) / (v[0] @ v[0]) for v in vectors]
        vectors = [torch.stack([v[0], w]) for v, w in zip(vectors, turned, strict=True)]
    if kind == "sparse":
        vectors = [v * (torch.arange(v.shape[1]) % 7 == 0) for v in vectors]
    if kind == "unit":
        vectors = [torch.eye(size, dtype=torch.float64)[[3, 3]] for size in SIZES]
    outputs, inputs = (v.unsqueeze(1) for v in vectors)  # [B, 1, size]
    space = Space((BlockSpec("layer", "outer", SIZES),))
    return Rows(space, {"layer": OuterBlock(outputs, inputs)}, torch.arange(2)), vectors


def side_variance(u, v, rank, distribution):
    square = (u @ u) * (v @ v) + (u @ v) ** 2
    if distribution == "signs":
        square = square - 2 * (u * u * v * v).sum()
    return float(square / rank)


def sketched_products(part, rows, seeds):
    """Return <P g, P h> of two rows for each seed."""
    found = torch.empty(seeds, dtype=torch.float64)
    for seed in range(seeds):
        mapped = build(part, rows.space, seed).map(rows)
        found[seed] = mapped.take(slice(0, 1)).inner(mapped.take(slice(1, 2)))[0, 0]
    return found


@pytest.mark.parametrize("distribution", ["signs", "normal"])
@pytest.mark.parametrize("kind", ["dense", "same", "orthogonal", "sparse", "unit"])
def test_inner_products_are_unbiased_with_the_stated_variance(kind, distribution):
    """z of the mean under 5, and the variance over seeds within its own sampling error."""
    rows, (e, x) = one_position(kind)
    part = Kronecker(rank_out=RANKS[0], rank_in=RANKS[1], distribution=distribution)
    found = sketched_products(part, rows, SEEDS)
    a, b = float(x[0] @ x[1]), float(e[0] @ e[1])
    inputs, outputs = (
        side_variance(v[0], v[1], rank, distribution) for v, rank in ((x, RANKS[1]), (e, RANKS[0]))
    )
    variance = (a**2 + inputs) * (b**2 + outputs) - (a * b) ** 2
    if kind == "unit" and distribution == "signs":  # |P e_i| = 1 exactly
        assert abs(variance) < 1e-12
        assert (found - 1).abs().max() < 1e-12
        return
    z = (float(found.mean()) - a * b) / (variance / SEEDS) ** 0.5
    assert abs(z) < 5
    assert 0.5 < float(found.var()) / variance < 1.7  # a product of two sums has long tails


@pytest.mark.parametrize("distribution", ["signs", "normal"])
def test_rows_of_many_positions_are_unbiased_too(distribution):
    rows = toy_rows(2)
    want = float(rows.take(slice(0, 1)).inner(rows.take(slice(1, 2))))
    part = Kronecker(2, distribution=distribution, uncovered="sketch")
    found = sketched_products(part, rows, 2048)
    assert abs(float(found.mean()) - want) < 5 * float(found.std()) / len(found) ** 0.5


# --- curvature in the sketch ----------------------------------------------------------------------
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("fields", [{"rank": 2}, {"rank_out": 1, "rank": 100}, {"rank": 100}])
def test_conjugate_gradients_lifted_through_the_sketch_equal_the_dense_inverse_in_it(
    curvature, fields
):
    task, train, test = world()
    damping = 2.0 if curvature == "hessian" else 0.1
    solvers = (
        {"name": "cholesky", "damping": damping},
        {"name": "cg", "damping": damping, "tolerance": 1e-14, "maximum_iterations": 200},
    )
    explicit, iterative = (
        Method(
            projector={"name": "kronecker", **fields},
            inverse_hessian={"curvature": curvature, "solver": solver},
            seed=4,
        )
        .attribute(task, train, test)
        .values
        for solver in solvers
    )
    assert (explicit - iterative).abs().max() < 1e-10
    plain = dattri.attribute(
        task, train, test, "if-explicit", curvature=curvature, damping=damping
    ).values
    same = (explicit - plain).abs().max() < 1e-10
    assert bool(same) is (fields == {"rank": 100})  # a full rank is no sketch


def test_the_lifted_curvature_is_p_h_p_transposed():
    task, train, test = world()
    method = Method(
        projector={"name": "kronecker", "rank": 2},
        inverse_hessian={"curvature": "hessian", "solver": {"name": "cholesky", "damping": 2.0}},
        seed=4,
    )
    got = method.attribute(task, train, test).values
    source = method.source.bind(task, task.checkpoints[0], (train[0][:3], train[1][:3]))
    order = positions(task.model, source.space)
    p = dense(build(Kronecker(2), source.space, seed=4), source.space)
    g, h = (flat_gradients(task.model, cross_entropies(b))[:, order] for b in (train, test))
    hessian = dense_hessian(task.model, train)[order][:, order]
    inside = p @ hessian @ p.T + 2 * torch.eye(len(p), dtype=torch.float64)
    want = (g @ p.T) @ torch.linalg.solve(inside, p @ h.T)
    assert (got - want).abs().max() < 1e-10


def test_rows_of_a_source_without_factors_are_kept_sketched_or_refused():
    task, train, test = world()
    rows = {}
    for uncovered in ("keep", "sketch"):
        method = Method(source="functional", projector=Kronecker(2, uncovered=uncovered))
        rows[uncovered] = method.attribute(task, train, test).values
    plain = Method(source="functional").attribute(task, train, test).values
    assert (rows["keep"] - plain).abs().max() < 1e-12
    assert (rows["sketch"] - plain).abs().max() > 1e-3
    with pytest.raises(SpecError, match=r"none of the blocks 0\.weight.*uncovered='sketch'"):
        Method(source="functional", projector=Kronecker(2, uncovered="drop")).attribute(
            task, train, test
        )


# --- refused --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank_in": 0}, "rank_in"),
        ({"initialisation": "svd"}, "one of 'random', 'pca'"),
        ({"distribution": "uniform"}, "one of 'signs', 'normal'"),
        ({"uncovered": "skip"}, "one of 'keep', 'sketch', 'drop'"),
        ({"ranks": 3}, "did you mean 'rank'"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(SpecError, match=message):
        Method(projector={"name": "kronecker", **fields})


def test_rows_of_another_space_are_refused():
    other = Space((BlockSpec("linear", "outer", (3, 4)),))
    rows = Rows(other, {"linear": DenseBlock(torch.zeros(1, 3, 4))}, torch.arange(1))
    with pytest.raises(SpecError, match="projector 'kronecker': the spaces differ"):
        build(Kronecker(2)).map(rows)
    with pytest.raises(SpecError, match="adjoint of the projector 'kronecker'"):
        build(Kronecker(2)).adjoint(toy_rows(2))
