"""Hessian-vector products of any function, against finite differences and dense Hessians."""

from __future__ import annotations

import pytest
import torch
from dattri_influence import hvp, hvp_at_x
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call, grad, vmap

from dattri_core import InputError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed=0):
    """Return a mean loss of parameters and data, and the parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def loss(parameters, x, y):
        return nn.functional.cross_entropy(functional_call(model, parameters, (x,)), y)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return loss, parameters, normal(7, 3, seed=1), torch.arange(7) % 2


def flat(nest):
    return torch.cat([t.flatten() for t in nest.values()])


def like(vector, nest):
    parts = vector.split([t.numel() for t in nest.values()])
    return {n: part.reshape(t.shape) for (n, t), part in zip(nest.items(), parts, strict=True)}


def test_of_a_network_against_finite_differences_and_the_dense_hessian():
    loss, parameters, x, y = network()
    vectors = {name: normal(5, *p.shape, seed=3) for name, p in parameters.items()}
    got = hvp(loss)((parameters, x, y), vectors)
    assert list(got) == list(parameters)
    matrix = hessian(lambda v: loss(like(v, parameters), x, y), flat(parameters))
    step = 1e-5
    for c in range(5):
        one = {name: v[c] for name, v in vectors.items()}
        found = torch.cat([v[c].flatten() for v in got.values()])
        torch.testing.assert_close(found, matrix @ flat(one), rtol=1e-10, atol=1e-12)
        up, down = (
            grad(loss)({n: p + sign * step * one[n] for n, p in parameters.items()}, x, y)
            for sign in (1, -1)
        )
        slope = (flat(up) - flat(down)) / (2 * step)
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-8)
        alone = hvp(loss)((parameters, x, y), one)
        torch.testing.assert_close(flat(alone), found, rtol=1e-12, atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 99))
def test_of_several_arguments_with_their_mixed_derivatives(size, count, seed):
    def function(a, b, c):
        return (a.sin() * b.exp().sum() * c).sum() + (a @ a) ** 2 * b[0, 0]

    a, b, c = normal(size, seed=seed), normal(2, size, seed=seed + 1) / 3, normal(size, seed=seed)
    matrix = hessian(
        lambda v: function(v[:size], v[size:].reshape(2, size), c), torch.cat([a, b.flatten()])
    )
    vectors = (normal(count, size, seed=5), normal(count, 2, size, seed=6))
    got = hvp(function, argnums=(0, 1))((a, b, c), vectors)
    assert isinstance(got, tuple)
    both = torch.cat([got[0], got[1].flatten(1)], 1)
    want = torch.cat([vectors[0], vectors[1].flatten(1)], 1) @ matrix
    torch.testing.assert_close(both, want, rtol=1e-9, atol=1e-9)
    again = hvp_at_x(function, a, b, c, argnums=[0, 1])(vectors)
    torch.testing.assert_close(again, got, rtol=1e-12, atol=1e-12)
    only = hvp(function, argnums=1)((a, b, c), vectors[1])
    want = vectors[1].flatten(1) @ matrix[size:, size:]
    torch.testing.assert_close(only.flatten(1), want, rtol=1e-9, atol=1e-9)


def test_scalars_lists_and_functions_without_curvature():
    def function(nest):
        return nest["a"] ** 3 * nest["b"][0].sum() + nest["b"][1].sum()

    nest = {"a": torch.tensor(2.0), "b": [torch.ones(2), torch.ones(3)]}
    vector = {"a": torch.tensor(1.0), "b": [torch.zeros(2), torch.ones(3)]}
    got = hvp(function)((nest,), vector)
    assert float(got["a"]) == pytest.approx(6 * 2.0 * 2.0)
    assert torch.equal(got["b"][0], torch.full((2,), 12.0))
    assert torch.equal(got["b"][1], torch.zeros(3))
    linear = hvp(lambda x: x.sum())((torch.ones(3),), torch.ones(4, 3))
    assert torch.equal(linear, torch.zeros(4, 3))


def test_at_a_point_the_function_runs_once_and_no_graph_is_held():
    runs = []

    def function(x):
        runs.append(1)
        return (x**4).sum()

    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    product = hvp_at_x(function, x)
    for vectors in (torch.ones(2), torch.ones(3, 2), torch.ones(2)):
        assert torch.equal(product(vectors), vectors * torch.tensor([12.0, 48.0]))
    assert len(runs) == 1
    assert not product(torch.ones(2)).requires_grad
    assert x.grad is None


def test_inside_of_vmap_over_vectors_and_over_points():
    loss, parameters, x, y = network()
    vectors = {name: normal(5, *p.shape, seed=3) for name, p in parameters.items()}
    want = hvp(loss)((parameters, x, y), vectors)
    mapped = vmap(lambda v: hvp(loss)((parameters, x, y), v))(vectors)
    torch.testing.assert_close(mapped, want, rtol=1e-10, atol=1e-12)
    fixed = vmap(hvp_at_x(loss, parameters, x, y))(vectors)
    torch.testing.assert_close(fixed, want, rtol=1e-10, atol=1e-12)
    points = normal(4, 3, seed=9)

    def function(p):
        return (p**4).sum() * p[0]

    got = vmap(lambda p, v: hvp(function)((p,), v))(points, normal(4, 3, seed=8))
    for i in range(4):
        one = hessian(function, points[i]) @ normal(4, 3, seed=8)[i]
        torch.testing.assert_close(got[i], one, rtol=1e-10, atol=1e-12)
    vectors = normal(6, 3, seed=8)
    many = vmap(lambda p: hvp(function)((p,), vectors))(points)
    assert many.shape == (4, 6, 3)
    want = vectors @ hessian(function, points[2])
    torch.testing.assert_close(many[2], want, rtol=1e-10, atol=1e-12)


def test_the_product_can_be_differentiated():
    vector = normal(3, seed=1)
    found = grad(lambda x: hvp(lambda p: (p**4).sum())((x,), vector).sum())(normal(3))
    torch.testing.assert_close(found, 24 * normal(3) * vector, rtol=1e-12, atol=1e-12)


def test_fused_attention_has_its_second_derivative():
    keys = normal(1, 2, 5, 4, seed=1)

    def function(queries):
        return (nn.functional.scaled_dot_product_attention(queries, keys, keys) ** 3).sum()

    queries = normal(1, 2, 5, 4)
    got = hvp(function)((queries,), keys)
    want = hessian(lambda q: (plain(q, keys) ** 3).sum(), queries).reshape(40, 40) @ keys.flatten()
    torch.testing.assert_close(got.flatten(), want, rtol=1e-9, atol=1e-9)


def plain(queries, keys):
    return (queries @ keys.mT / 2).softmax(-1) @ keys


@pytest.mark.parametrize(
    ("arguments", "argnums", "vectors", "message"),
    [
        ((torch.ones(2),), 1, torch.ones(2), "got 1 for a function of 1 arguments"),
        ((torch.ones(2),), (), torch.ones(2), r"got \(\)"),
        ((torch.ones(2),), (0, 0), torch.ones(2), "different numbers"),
        ((torch.ones(2, dtype=torch.long),), 0, torch.ones(2), "torch.int64 on cpu"),
        (([],), 0, [], "got no tensor"),
        ((torch.ones(2),), 0, torch.ones(3), r"shapes \{'value': \(3,\)\}, expected"),
        ((torch.ones(2),), 0, {"a": torch.ones(2)}, "expected"),
        ((torch.ones(2),), 0, torch.ones(1, 5, 2), "one more axis in front"),
        ((torch.ones(2, 2),), 0, torch.ones(2, 2), "returned shape"),
        (
            ({"a": torch.ones(2), "b": torch.ones(2)},),
            0,
            {"a": torch.ones(3, 2), "b": torch.ones(4, 2)},
            "expected",
        ),
        (
            (torch.ones(2), torch.ones(2).double()),
            (0, 1),
            (torch.ones(2), torch.ones(2)),
            "torch.float32 on cpu, torch.float64 on cpu",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, argnums, vectors, message):
    def function(*given):
        first = given[0]
        tensor = next(iter(first.values())) if isinstance(first, dict) else first
        return tensor.sum(0)

    with pytest.raises(InputError, match=message):
        hvp(function, argnums)(arguments, vectors)
    with pytest.raises(InputError, match=message):
        hvp_at_x(function, *arguments, argnums=argnums)(vectors)


@pytest.mark.cuda
def test_on_cuda():
    loss, parameters, x, y = network()
    vectors = {name: normal(5, *p.shape, seed=3) for name, p in parameters.items()}
    moved = {n: p.cuda() for n, p in parameters.items()}
    got = hvp(loss)((moved, x.cuda(), y.cuda()), {n: v.cuda() for n, v in vectors.items()})
    want = hvp(loss)((parameters, x, y), vectors)
    for name, value in got.items():
        assert value.is_cuda
        torch.testing.assert_close(value.cpu(), want[name], rtol=1e-9, atol=1e-11)
