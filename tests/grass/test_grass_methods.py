"""GraSS and FactGraSS: the Gauss-Newton matrix of each layer in a sketch, against dense algebra."""

from __future__ import annotations

import pytest
import torch
from oracles.block_gauss_newton import layer_by_layer, normed_world, rows_of
from oracles.sketches import matrix_of
from oracles.toy_tasks import examples, mlp, world
from scipy.stats import spearmanr

import dattri_core as dattri
from dattri_core import Method, RandomStream, Rows, Task

GAUSS_NEWTON = {"name": "gauss-newton", "block": True}
SOLVER = {"name": "spectral", "damping": {"relative": 0.1}}
METHODS = ("grass", "factgrass")
CPU = torch.device("cpu")


@pytest.mark.parametrize("make", [world, normed_world])
@pytest.mark.parametrize("name", METHODS)
def test_ranks_above_every_layer_are_block_gauss_newton(name, make):
    task, train, test = make()
    got = dattri.method(name).attribute(task, train, test).values
    plain = Method(inverse_hessian={"curvature": GAUSS_NEWTON, "solver": SOLVER})
    want = layer_by_layer(*(rows_of(plain, task, batch) for batch in (train, test)), 0.1)
    assert got.dtype == torch.float64
    assert (got - want).abs().max() < 1e-8
    assert (got - plain.attribute(task, train, test).values).abs().max() < 1e-8


@pytest.mark.parametrize("block", [True, False])
def test_a_mask_of_all_coordinates_of_a_row_is_no_sketch(block):
    task, train, test = world()
    inverse = {"curvature": {"name": "gauss-newton", "block": False}, "solver": "cholesky"}
    want = Method(inverse_hessian=inverse).attribute(task, train, test).values
    inverse["curvature"]["block"] = block  # a sketched row is one block
    got = Method(projector={"name": "mask", "dim": 43}, inverse_hessian=inverse)
    assert (got.attribute(task, train, test).values - want).abs().max() < 1e-8
    fewer = Method(projector={"name": "mask", "dim": 42}, inverse_hessian=inverse)
    assert (fewer.attribute(task, train, test).values - want).abs().max() > 1e-4


@pytest.mark.parametrize("make", [world, normed_world])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("grass", {"dim": 3, "mask_dim": 10}),
        ("grass", {"dim": 8, "mask_dim": 30, "scope": "row", "nonzeros": 2}),
        ("factgrass", {"dim": 4, "mask_rank": 3}),
        ("factgrass", {"dim": 5, "mask_rank_in": 3, "mask_rank_out": 2, "uncovered": "keep"}),
        ("factgrass", {"dim": 4, "mask_rank": 3, "uncovered": "drop"}),
    ],
)
def test_scores_are_those_of_dense_algebra_in_the_sketch(name, fields, make):
    task, train, test = make()
    method = dattri.method(name, seed=6, **fields)
    got = method.attribute(task, train, test).values
    rows = [rows_of(method, task, batch) for batch in (train, test)]
    stream = RandomStream(6, "projector", 0)
    sketch = method.projector.build(rows[0].space, stream=stream, device=CPU)
    matrix = matrix_of(sketch)
    mapped = [Rows.from_flat(sketch.out_space, one.flat() @ matrix.T, one.index) for one in rows]
    assert (got - layer_by_layer(*mapped, 0.1)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grass", [{"dim": r, "mask_dim": 100} for r in (2, 6, 16)]),
        ("grass", [{"dim": r, "mask_dim": r} for r in (3, 9, 22)]),
        ("factgrass", [{"dim": r, "mask_rank": 100} for r in (2, 6, 16)]),
        ("factgrass", [{"dim": 100, "mask_rank": r} for r in (1, 3, 5)]),
    ],
)
def test_scores_come_nearer_to_the_exact_ones_as_ranks_grow(name, settings):
    """Mean over seeds of Spearman's correlation with block Gauss-Newton rises, to 1 at the end."""
    task, train, test = world(n_train=30, n_test=10)
    want = dattri.method(name).attribute(task, train, test).values

    def agreement(fields, seed):
        got = dattri.method(name, seed=seed, **fields).attribute(task, train, test).values
        return float(spearmanr(got.flatten(), want.flatten()).statistic)

    means = [sum(agreement(fields, seed) for seed in range(6)) / 6 for fields in settings]
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.05
    large = {"dim": 100, "mask_dim" if name == "grass" else "mask_rank": 100}
    assert agreement(large, 0) > 1 - 1e-9


@pytest.mark.parametrize("name", METHODS)
def test_self_influence_and_another_damping_reuse_the_fit(name):
    task, train, test = world()
    mask = {"mask_dim": 12} if name == "grass" else {"mask_rank": 3}
    fitted = dattri.method(name, dim=4, **mask).fit(task, train)
    own = fitted.self_influence()
    assert (own - fitted.attribute(train).values.diagonal()).abs().max() < 1e-10
    swept = fitted.with_(damping=0.5)
    assert swept._held.chain.source is fitted._held.chain.source
    fresh = swept.method.attribute(task, train, test).values
    assert (swept.attribute(test).values - fresh).abs().max() < 1e-10


def test_products_with_the_hessian_are_lifted_through_the_sketch():
    task, train, test = world()
    for projector in ({"name": "factgrass", "dim": 4, "mask_rank": 3}, {"name": "grass"}):
        explicit, iterative = (
            Method(
                projector=projector,
                inverse_hessian={"curvature": "ggn", "solver": {**solver, "damping": 0.1}},
            )
            .attribute(task, train, test)
            .values
            for solver in (
                {"name": "cholesky"},
                {"name": "cg", "tolerance": 1e-14, "maximum_iterations": 300},
            )
        )
        assert (explicit - iterative).abs().max() < 1e-9


def test_their_fields_are_overridden_by_name_and_they_are_their_specs():
    method = dattri.method("factgrass", dim=8, mask_rank_out=2, nonzeros=4, damping=0.3)
    assert (method.projector.dim, method.projector.mask_rank_out) == (8, 2)
    assert method.projector.uncovered == "sketch"
    assert Method(**method.to_spec()) == method
    flat = dattri.method("grass", dim=8, scope="row")
    assert flat.projector.scope == "row"
    assert flat.to_spec() != method.to_spec()
    train, test = examples(9), examples(3, seed=9)
    for name in METHODS:
        shape = dattri.attribute(Task(mlp()), train, test, name, dim=2).shape
        assert shape == (9, 3)
