"""LoGra: the Gauss-Newton matrix of each layer in a Kronecker sketch, against dense algebra."""

from __future__ import annotations

import pytest
import torch
from oracles.block_gauss_newton import layer_by_layer, normed_world, rows_of
from oracles.toy_tasks import examples, mlp, world

import dattri_core as dattri
from dattri_core import Method, RandomStream, Task

BLOCK = {"curvature": {"name": "gauss-newton", "block": True}}


@pytest.mark.parametrize("make", [world, normed_world])
@pytest.mark.parametrize("initialisation", ["random", "pca"])
def test_a_full_rank_is_block_gauss_newton(make, initialisation):
    task, train, test = make()
    method = dattri.method("logra", initialisation=initialisation)
    got = method.attribute(task, train, test).values
    assert method.projector.rank == 64  # above every side here
    plain = Method(
        inverse_hessian={**BLOCK, "solver": {"name": "spectral", "damping": {"relative": 0.1}}}
    )
    assert (got - plain.attribute(task, train, test).values).abs().max() < 1e-10
    want = layer_by_layer(*(rows_of(plain, task, batch) for batch in (train, test)), 0.1)
    assert (got - want).abs().max() < 1e-10


@pytest.mark.parametrize("make", [world, normed_world])
@pytest.mark.parametrize("initialisation", ["random", "pca"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_scores_are_those_of_dense_algebra_in_the_sketch(make, initialisation, rank):
    task, train, test = make()
    method = dattri.method("logra", rank=rank, initialisation=initialisation, seed=6)
    got = method.attribute(task, train, test).values
    sketch = method.fit(task, train)._held.chain.maps[0]
    if initialisation == "random":
        space = rows_of(method, task, train).space
        device = torch.device("cpu")
        sketch = method.projector.build(
            space, stream=RandomStream(6, "projector", 0), device=device
        )
    mapped = [sketch.map(rows_of(method, task, batch)) for batch in (train, test)]
    assert max(spec.size for spec in sketch.out_space) <= rank * rank
    assert (got - layer_by_layer(*mapped, 0.1)).abs().max() < 1e-9


def test_self_influence_and_another_damping_reuse_the_fit():
    task, train, test = world()
    fitted = dattri.method("logra", rank=2, initialisation="pca").fit(task, train)
    own = fitted.self_influence()
    assert (own - fitted.attribute(train).values.diagonal()).abs().max() < 1e-10
    swept = fitted.with_(damping=0.5)
    assert swept._held.chain.maps[0] is fitted._held.chain.maps[0]
    fresh = dattri.method("logra", rank=2, initialisation="pca", damping=0.5)
    assert (
        swept.attribute(test).values - fresh.attribute(task, train, test).values
    ).abs().max() < (1e-10)
    relative = fitted.with_(scorer="relatif").attribute(test).values
    want = fitted.attribute(test).values / own.sqrt().unsqueeze(1)
    assert (relative - want).abs().max() < 1e-10


def test_its_fields_are_overridden_by_name_and_it_is_its_spec():
    method = dattri.method("logra", rank=8, rank_out=2, distribution="normal", damping=0.3)
    assert (method.projector.rank, method.projector.rank_out) == (8, 2)
    assert method.projector.distribution == "normal"
    assert Method(**method.to_spec()) == method
    train, test = examples(9), examples(3, seed=9)
    shape = dattri.attribute(Task(mlp()), train, test, "logra", rank=2).shape
    assert shape == (9, 3)
