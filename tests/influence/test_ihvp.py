"""Inverse-Hessian- and inverse-Fisher-vector products against dense algebra in float64."""

from __future__ import annotations

import subprocess
import sys
import warnings

import dattri_influence
import pytest
import torch
from dattri_influence import (
    InverseProduct,
    hvp_at_x,
    ifvp_datainf,
    ifvp_explicit,
    ihvp_arnoldi,
    ihvp_at_x_arnoldi,
    ihvp_at_x_cg,
    ihvp_at_x_explicit,
    ihvp_at_x_lissa,
    ihvp_cg,
    ihvp_explicit,
    ihvp_lissa,
)
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call, grad, vmap

from dattri_core import ConvergenceWarning, Damping, InputError, NumericsError

PAIRS = {
    "explicit": (ihvp_explicit, ihvp_at_x_explicit, {}),
    "cg": (ihvp_cg, ihvp_at_x_cg, {"tolerance": 1e-12, "maximum_iterations": 500}),
    "lissa": (ihvp_lissa, ihvp_at_x_lissa, {"depth": 20_000}),
    "arnoldi": (ihvp_arnoldi, ihvp_at_x_arnoldi, {}),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(size=6, seed=0, least=0.5, most=4.0):
    """Return a function of x with a constant Hessian, and that Hessian."""
    basis = torch.linalg.qr(normal(size, size, seed=seed)).Q
    matrix = basis * torch.linspace(least, most, size, dtype=torch.float64) @ basis.mT
    return lambda x: x @ matrix @ x / 2, matrix


def network(seed=0):
    """Return a mean loss of dicts of parameters and data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def loss(parameters, x, y):
        return nn.functional.cross_entropy(functional_call(model, parameters, (x,)), y)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return loss, parameters, normal(12, 3, seed=1), torch.arange(12) % 2


def flat(nest, axes=0):
    return torch.cat([t.flatten(axes) for t in nest.values()], axes)


def like(vector, nest):
    parts = vector.split([t.numel() for t in nest.values()])
    return {n: part.reshape(t.shape) for (n, t), part in zip(nest.items(), parts, strict=True)}


@pytest.mark.parametrize("name", PAIRS)
def test_of_a_function_of_vectors(name):
    plain, at_x, options = PAIRS[name]
    function, matrix = quadratic()
    x, vectors = normal(6), normal(5, 6, seed=1)
    for damping in (0.0, 0.3):
        shifted = matrix + damping * torch.eye(6, dtype=torch.float64)
        want = torch.linalg.solve(shifted, vectors.mT).mT
        got = plain(function, argnums=0, damping=damping, **options)((x,), vectors)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
        product = at_x(function, x, argnums=0, damping=damping, **options)
        torch.testing.assert_close(product(vectors), got, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(product(vectors[2]), want[2], rtol=1e-8, atol=1e-9)
        assert product.stats["damping"] == damping
        assert isinstance(product, InverseProduct)
    relative = at_x(function, x, damping=Damping(0.5, relative=True), **options)
    relative(vectors)
    mean = float(matrix.diagonal().mean())
    assert relative.stats["damping"] == pytest.approx(0.5 * mean, rel=0.3)


@pytest.mark.parametrize("name", PAIRS)
def test_of_a_network_with_a_dict_of_parameters(name):
    _, at_x, options = PAIRS[name]
    loss, parameters, x, y = network()
    matrix = hessian(lambda v: loss(like(v, parameters), x, y), flat(parameters))
    damping = 0.2 - float(torch.linalg.eigvalsh(matrix)[0].clamp(max=0))
    shifted = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    vectors = {n: normal(4, *p.shape, seed=3) for n, p in parameters.items()}
    product = at_x(loss, parameters, x, y, damping=damping, **options)
    got = product(vectors)
    assert list(got) == list(parameters)
    want = torch.linalg.solve(shifted, flat(vectors, 1).mT).mT
    torch.testing.assert_close(flat(got, 1), want, rtol=1e-7, atol=1e-9)
    back = hvp_at_x(loss, parameters, x, y)(got)
    both = flat(back, 1) + damping * flat(got, 1)
    torch.testing.assert_close(both, flat(vectors, 1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PAIRS)
def test_of_two_arguments_at_once(name):
    plain, _, options = PAIRS[name]
    _, matrix = quadratic(5)

    def function(a, data, b):
        both = torch.cat([a, b])
        return both @ matrix @ both / 2 + data.sum()

    vectors = (normal(3, 2, seed=1), normal(3, 3, seed=2))
    got = plain(function, argnums=(0, 2), **options)((normal(2), torch.ones(4), normal(3)), vectors)
    want = torch.linalg.solve(matrix, torch.cat(vectors, 1).mT).mT
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-8, atol=1e-9)


def test_the_two_spellings_of_the_readme_of_a_peer():
    def function(x, param):
        return torch.cosh(x / param).sum()

    x, param, v = normal(2), normal(1, seed=4), normal(5, 2, seed=1)
    one = ihvp_cg(function, argnums=0, maximum_iterations=2)((x, param), v)
    other = ihvp_at_x_cg(function, x, param, argnums=0, maximum_iterations=2)(v)
    assert torch.equal(one, other)
    torch.testing.assert_close(one, v * param**2 / torch.cosh(x / param), rtol=1e-9, atol=1e-9)


def test_a_sweep_over_dampings_shares_the_work():
    runs = []
    inner, matrix = quadratic()

    def function(x):
        runs.append(1)
        return inner(x)

    vectors = normal(5, 6, seed=1)
    for at_x in (ihvp_at_x_explicit, ihvp_at_x_arnoldi, ihvp_at_x_cg):
        runs.clear()
        product = at_x(function, normal(6), damping=0.1)
        for damping in (0.01, 0.1, 1.0):
            got = product.with_damping(damping)(vectors)
            want = torch.linalg.solve(matrix + damping * torch.eye(6).double(), vectors.mT).mT
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert len(runs) == 1  # forward and backward pass of the point; products reuse them


def test_arnoldi_takes_the_largest_by_magnitude_and_may_keep_the_rest():
    function, matrix = quadratic(least=-3.0, most=4.0)
    values, basis = torch.linalg.eigh(matrix)
    top = values.abs().argsort(descending=True)[:2]
    assert float(values[top].min()) < 0
    vectors = normal(3, 6, seed=1)
    inside = vectors @ basis[:, top]
    want = inside / (values[top] + 0.5) @ basis[:, top].mT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        got = ihvp_at_x_arnoldi(function, normal(6), rank=2, damping=0.5)(vectors)
        kept = ihvp_at_x_arnoldi(function, normal(6), rank=2, damping=0.5, complement="keep")(
            vectors
        )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    rest = (vectors - inside @ basis[:, top].mT) / 0.5
    torch.testing.assert_close(kept, want + rest, rtol=1e-9, atol=1e-10)


# --- LiSSA on samples -----------------------------------------------------------------------------
def regression():
    """Return a mean squared error, linear in its parameters: every sample is convex."""

    def loss(x, parameters, y):
        return ((x @ parameters["w"] - y["target"]) ** 2).mean()

    return loss, normal(40, 4, seed=1), {"w": normal(4)}, {"target": normal(40, seed=2)}


SAMPLED = {"argnums": 1, "in_dims": (0, None, 0), "batch": 20, "damping": 1.0}


def test_lissa_draws_examples_of_the_arguments_that_in_dims_names():
    loss, x, parameters, y = regression()
    matrix = 2 * x.mT @ x / 40 + torch.eye(4, dtype=torch.float64)
    vectors = {"w": normal(3, 4, seed=5)}
    want = torch.linalg.solve(matrix, vectors["w"].mT).mT
    options = {**SAMPLED, "depth": 60}
    mean = ihvp_lissa(loss, repeats=20, **options)((x, parameters, y), vectors)["w"]
    one = ihvp_at_x_lissa(loss, x, parameters, y, **options)
    assert float((mean - want).norm() / want.norm()) < 0.06
    assert float((one(vectors)["w"] - want).norm() / want.norm()) > 0.06
    again = ihvp_at_x_lissa(loss, x, parameters, y, **options)
    assert torch.equal(again(vectors)["w"], one(vectors)["w"])
    seeded = ihvp_at_x_lissa(loss, x, parameters, y, seed=1, **options)
    assert not torch.allclose(seeded(vectors)["w"], one(vectors)["w"])
    turned = ihvp_at_x_lissa(
        lambda x, p, y: loss(x.mT, p, y),
        x.mT,
        parameters,
        y,
        **{**options, "in_dims": (1, None, 0)},
    )
    torch.testing.assert_close(turned(vectors)["w"], one(vectors)["w"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("in_dims", "message"),
    [
        (None, "in_dims: got None for 3 arguments"),
        ((0, None), "for 3 arguments"),
        ((0, 0, 0), "None for those that the function is differentiated by"),
        ((None, None, None), "the arguments have no examples"),
        ((1, None, 0), r"have \[4, 40\] examples"),
    ],
)
def test_in_dims_that_do_not_fit_are_refused(in_dims, message):
    loss, x, parameters, y = regression()
    with pytest.raises(InputError, match=message):
        ihvp_at_x_lissa(loss, x, parameters, y, **{**SAMPLED, "in_dims": in_dims})({"w": normal(4)})


# --- what goes wrong ------------------------------------------------------------------------------
def test_indefinite_and_singular_functions_say_so():
    indefinite, matrix = quadratic(least=-2.0)
    x, vector = normal(6), normal(6, seed=1)
    with pytest.warns(RuntimeWarning, match="stay negative"):
        product = ihvp_at_x_explicit(indefinite, x)
    torch.testing.assert_close(product(vector), torch.linalg.solve(matrix, vector))
    with pytest.warns(ConvergenceWarning, match="negative curvature"):
        ihvp_at_x_cg(indefinite, x)(vector)
    with pytest.raises(NumericsError, match="'lissa': diverges"):
        ihvp_at_x_lissa(indefinite, x)(vector)
    with pytest.raises(NumericsError, match="give a damping above"):
        ihvp_at_x_explicit(lambda x: x[0] ** 2, torch.ones(2))
    with pytest.raises(InputError, match="the vectors have shapes"):
        ihvp_at_x_cg(indefinite, x)(normal(5))


def test_single_precision_and_graphs():
    _, matrix = quadratic()
    low = matrix.float()
    x = nn.Parameter(torch.randn(6))
    vector = torch.ones(2, 6, requires_grad=True)
    for _, at_x, _ in PAIRS.values():
        got = at_x(lambda x: x @ low @ x / 2, x)(vector)
        assert got.dtype == torch.float32
        assert not got.requires_grad
        want = torch.linalg.solve(matrix, torch.ones(6).double()).float()
        torch.testing.assert_close(got[1], want, rtol=1e-3, atol=1e-4)


# --- Fisher ---------------------------------------------------------------------------------------
def per_example():
    loss, parameters, x, y = network()
    gradients = vmap(grad(lambda p, x, y: loss(p, x[None], y[None])), (None, 0, 0))(
        parameters, x, y
    )
    vectors = {n: normal(4, *p.shape, seed=3) for n, p in parameters.items()}
    return gradients, vectors


def test_ifvp_explicit_is_the_damped_inverse_of_the_second_moment():
    gradients, vectors = per_example()
    rows = flat(gradients, 1)
    matrix = rows.mT @ rows / len(rows)
    for damping in (0.1, 1e-3):
        eye = torch.eye(len(matrix), dtype=torch.float64)
        want = torch.linalg.solve(matrix + damping * eye, flat(vectors, 1).mT).mT
        got = ifvp_explicit(gradients, damping=0.1).with_damping(damping)(vectors)
        torch.testing.assert_close(flat(got, 1), want, rtol=1e-9, atol=1e-9)
    single = ifvp_explicit(rows, damping=1e-3)(flat(vectors, 1)[1])
    torch.testing.assert_close(single, want[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [True, False])
def test_ifvp_datainf_is_the_mean_of_inverses(block):
    gradients, vectors = per_example()

    def mean_of_inverses(rows, flats, damping):
        eye = torch.eye(rows.shape[1], dtype=torch.float64)
        each = [torch.linalg.solve(torch.outer(g, g) + damping * eye, flats.mT).mT for g in rows]
        return torch.stack(each).mean(0)

    got = ifvp_datainf(gradients, damping=0.2, block=block)(vectors)
    if not block:
        want = mean_of_inverses(flat(gradients, 1), flat(vectors, 1), 0.2)
        torch.testing.assert_close(flat(got, 1), want, rtol=1e-9, atol=1e-10)
        return
    default = ifvp_datainf(gradients)(vectors)
    for name, rows in gradients.items():
        flats = vectors[name].flatten(1)
        want = mean_of_inverses(rows.flatten(1), flats, 0.2)
        torch.testing.assert_close(got[name].flatten(1), want, rtol=1e-9, atol=1e-10)
        damping = 0.1 * float(rows.square().mean())
        want = mean_of_inverses(rows.flatten(1), flats, damping)
        torch.testing.assert_close(default[name].flatten(1), want, rtol=1e-8, atol=1e-8)


def test_gradients_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"hold \[2, 3\] gradients"):
        ifvp_explicit({"a": torch.ones(2, 4), "b": torch.ones(3, 4)}, damping=0.1)
    with pytest.raises(InputError, match=r"hold \[0\] gradients"):
        ifvp_datainf(torch.ones(0, 4), damping=0.1)
    with pytest.raises(InputError, match="per-example gradients: expected floating point"):
        ifvp_explicit(torch.ones(3, 4, dtype=torch.long), damping=0.1)


# --- the package ----------------------------------------------------------------------------------
def test_names_are_there_and_listing_them_imports_no_torch():
    for name in dattri_influence.__all__:
        assert callable(getattr(dattri_influence, name)), name
    with pytest.raises(AttributeError, match="no attribute 'ihvp_magic'"):
        dattri_influence.ihvp_magic
    code = "import dattri_influence.plugin, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.cuda
@pytest.mark.parametrize("name", PAIRS)
def test_on_cuda(name):
    _, at_x, options = PAIRS[name]
    function, matrix = quadratic()
    on_device = matrix.cuda()
    product = at_x(lambda x: x @ on_device @ x / 2, normal(6).cuda(), damping=0.1, **options)
    vectors = normal(5, 6, seed=1)
    got = product(vectors.cuda())
    assert got.is_cuda
    want = at_x(function, normal(6), damping=0.1, **options)(vectors)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-9)
    relative = product.with_damping(Damping(0.5, relative=True))
    assert relative(vectors.cuda()).is_cuda
