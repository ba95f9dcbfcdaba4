"""Optima: closed forms, models trained from nothing, certificates, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from dattri_parts.training import (
    ModelRetraining,
    Optimum,
    Recipe,
    leave_one_out,
    optima,
    preconditioners,
    random_subsets,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training_toys import (
    CLASSES,
    WIDTH,
    N,
    NextToken,
    classes,
    difference,
    everything,
    logistic,
    numbers,
    retraining,
    sequences,
)

import dattri_core as dattri

DATA = Path(os.environ.get("DATTRI_DATA", "missing"))
L2 = 1e-2
SETS = [*leave_one_out(N), *random_subsets(N, 6, seed=2), *random_subsets(N, 2, fraction=0.05)]


def newton(inputs, labels, l2):
    """The optimum of multinomial logistic regression from zero by dense Newton steps."""
    f = torch.cat([inputs.double(), torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    one_hot = nn.functional.one_hot(labels, CLASSES).double()
    w, eye = f.new_zeros(CLASSES, f.shape[1]), torch.eye(CLASSES * f.shape[1], dtype=f.dtype)
    for _ in range(200):
        p = (f @ w.T).softmax(1)
        slope = (p - one_hot).T @ f / len(f) + l2 * w
        curved = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        hessian = torch.einsum("iab,id,ie->adbe", curved, f, f).reshape(eye.shape) / len(f)
        step = torch.linalg.solve(hessian + l2 * eye, slope.flatten())
        size = 1 / (1 + 5 * (slope.flatten() @ step).sqrt())  # damped: each step descends
        w = w - size * step.reshape(w.shape)
        if slope.norm() < 1e-14:
            break
    assert slope.norm() < 1e-12
    return w


def weights(state):
    return torch.cat([state["weight"], state["bias"][:, None]], 1)


@pytest.mark.parametrize("l2", [1e-1, 1e-4])
def test_every_model_is_that_of_newton_steps_from_zero(l2):
    inputs, labels = classes()
    held = retraining(logistic, Optimum(l2, 1e-12), together=100)
    for chosen, state in zip(SETS, held.train(SETS), strict=True):
        index = torch.tensor(chosen.mask)
        want = newton(inputs[index], labels[index], l2)
        assert (weights(state) - want).abs().max() < 1e-8
        assert held.gradient_norm(chosen, state) < 2e-12
    assert state["weight"].dtype == torch.float64


def test_leaving_one_out_of_a_ridge_regression_is_the_formula_of_the_hat_matrix():
    (x, y), l2 = numbers(), 0.05
    held = retraining(
        lambda: nn.Linear(WIDTH, 1, bias=False),
        Optimum(l2 * N / (N - 1), 1e-13),
        numbers,
        "squared-error",
        test_data=(x, y),
        together=N,
    )
    # the penalty of the mean over n - 1 examples that is n l2 of their sum
    hat = x @ torch.linalg.solve(x.T @ x + N * l2 * torch.eye(WIDTH, dtype=x.dtype), x.T)
    residual = (y - hat @ y) / (1 - hat.diagonal())
    for i, state in enumerate(held.train(leave_one_out(N))):
        loss = held.measure(state)["loss"][i]
        assert abs(loss - residual[i].item() ** 2 / 2) < 1e-10


def test_the_certificate_is_the_norm_of_the_gradient_of_the_objective():
    inputs, labels = classes()
    held = retraining(logistic, Optimum(L2))
    state = {"weight": torch.randn(CLASSES, WIDTH), "bias": torch.randn(CLASSES)}
    leaf = {name: t.double().requires_grad_() for name, t in state.items()}
    chosen = SETS[4]
    mask = torch.tensor(chosen.mask)
    out = inputs[mask].double() @ leaf["weight"].T + leaf["bias"]
    penalty = L2 / 2 * sum(t.square().sum() for t in leaf.values())
    (nn.functional.cross_entropy(out, labels[mask]) + penalty).backward()
    want = torch.cat([t.grad.flatten() for t in leaf.values()]).norm().item()
    assert abs(held.gradient_norm(chosen, state) - want) < 1e-12


@given(st.sets(st.integers(0, len(SETS) - 1), min_size=1, max_size=6), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_a_model_does_not_depend_on_the_others(chosen, together):
    held = retraining(logistic, Optimum(L2, 1e-12), together=together)
    picked = [SETS[k] for k in sorted(chosen, key=lambda k: k % 3)]
    alone = retraining(logistic, Optimum(L2, 1e-12))
    for one, state in zip(picked, held.train(picked), strict=True):
        (want,) = alone.train([one])
        assert difference(state, want) < 1e-9


@pytest.mark.parametrize("largest", [0, 10_000])
@pytest.mark.parametrize("loss", ["cross-entropy", "squared-error"])
def test_the_preconditioner_does_not_move_the_optimum(monkeypatch, largest, loss):
    monkeypatch.setattr(optima, "LARGEST", largest)
    data = classes if loss == "cross-entropy" else numbers
    build = logistic if loss == "cross-entropy" else (lambda: nn.Linear(WIDTH, 1).double())
    tight, loose = (
        retraining(build, Optimum(L2, norm), data, loss, together=50) for norm in (1e-13, 1e-7)
    )
    for chosen, one, other in zip(SETS, tight.train(SETS), loose.train(SETS), strict=True):
        assert tight.gradient_norm(chosen, one) < 2e-13
        assert difference(one, other) < 1e-7 / L2  # |g| / l2 bounds the distance


def test_the_factor_is_the_inverse_hessian_and_the_kronecker_one_is_exact_for_squares():
    inputs, labels = classes(dtype=torch.float64)
    convex = optima.Convex(dattri.cross_entropy, inputs, labels, CLASSES, L2)
    point = torch.randn(CLASSES, WIDTH, dtype=torch.float64)

    def objective(w):
        loss = nn.functional.cross_entropy(inputs @ w.T, labels)
        return loss + L2 / 2 * w.square().sum()

    hessian = torch.func.hessian(objective)(point).reshape(point.numel(), -1)
    rows = torch.randn(4, *point.shape, dtype=torch.float64)
    want = torch.linalg.solve(hessian, rows.flatten(1).T).T.reshape(rows.shape)
    assert (preconditioners.factored(convex, point)(rows) - want).norm() < 1e-4 * want.norm()
    slope = torch.func.grad(objective)(point)
    value, found = convex.evaluate(point[None], torch.full((1, N), 1 / N, dtype=torch.float64))
    assert (found[0] - slope).abs().max() < 1e-13
    assert abs(value.item() - objective(point).item()) < 1e-13

    features, targets = numbers()
    convex = optima.Convex(dattri.squared_error, features, targets, 1, L2)
    hessian = features.T @ features / N + L2 * torch.eye(WIDTH, dtype=torch.float64)
    want = rows[:, :1] @ torch.linalg.inv(hessian)
    assert (preconditioners.kronecker(convex, point[:1])(rows[:, :1]) - want).abs().max() < 1e-11


def test_fixed_features_and_no_bias():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("first", torch.linspace(-1, 1, WIDTH * 4).reshape(WIDTH, 4))
            self.norm = nn.BatchNorm1d(4).requires_grad_(False)
            self.head = nn.Linear(4, CLASSES, bias=False)

        def forward(self, inputs):
            return self.head(self.norm(torch.tanh(inputs @ self.first)))

    held = retraining(Frozen, Optimum(L2, 1e-12), together=9)
    for chosen, state in zip(SETS[-9:], held.train(SETS[-9:]), strict=True):
        assert held.gradient_norm(chosen, state) < 2e-12
    run = held.run(SETS[-1])
    assert (run.epochs, run.learning_rates) == ((0,), (1.0,))
    assert difference(run.states[0], state) < 1e-9
    assert difference(run.model.state_dict(), run.states[0]) == 0
    assert not run.model.training


class _RandomFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, 4).requires_grad_(False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, inputs):
        return self.head(torch.tanh(self.first(inputs)))


def _deep():
    return nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, CLASSES))


@pytest.mark.parametrize(
    ("build", "data", "loss", "message"),
    [
        (_deep, classes, "cross-entropy", "all that is trained"),
        (_RandomFeatures, classes, "cross-entropy", r"'first\.weight', 'first\.bias'.*drawn anew"),
        (NextToken, sequences, "causal-lm", "'causal-lm' is trained by a Recipe"),
    ],
)
def test_models_without_one_optimum_are_refused(build, data, loss, message):
    with pytest.raises(dattri.InputError, match=message):
        list(retraining(build, Optimum(L2), data, loss).train([everything()]))


def test_a_gradient_that_rounding_keeps_large_is_refused():
    held = retraining(logistic, Optimum(L2, 1e-30))
    with pytest.raises(dattri.NumericsError, match="on 40 examples stays at the norm"):
        list(held.train([everything()]))


@pytest.mark.parametrize("numbers", [{"l2": 0.0}, {"l2": -1.0}, {"l2": 1.0, "gradient_norm": 0.0}])
def test_numbers_that_leave_no_optimum_are_refused(numbers):
    with pytest.raises(dattri.InputError, match="expected a number above 0"):
        Optimum(**numbers)


def test_an_optimum_has_no_epochs_and_a_recipe_no_certificate():
    with pytest.raises(dattri.InputError, match="an optimum has no epochs"):
        retraining(logistic, Optimum(L2)).run(everything(), keep=(1,))
    held = retraining(logistic, Recipe(1, 10, 0.1))
    (state,) = held.train([everything()])
    with pytest.raises(dattri.InputError, match="a Recipe stops where it stops"):
        held.gradient_norm(everything(), state)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.skipif(not (DATA / "mnist").exists(), reason="set DATTRI_DATA")
def test_twenty_models_of_mnist_trained_from_nothing_agree():
    """Left-out models of 5000 x 7850 against searches from zero without the factored Hessian."""
    from dattri_benchmarks.mnist import read_mnist
    from dattri_benchmarks.models import mnist_logistic_regression

    parts = []
    for part, count in (("train", 5000), ("t10k", 500)):
        images, labels = read_mnist(part)
        scaled = torch.from_numpy((images[:count] / np.float32(255) - 0.1307) / 0.3081).float()
        parts.append((scaled, torch.from_numpy(labels[:count].astype(np.int64))))
    train, test = parts
    optimum = Optimum(1e-2, 1e-11)
    held = ModelRetraining(
        mnist_logistic_regression,
        optimum,
        "cross-entropy",
        train,
        test,
        ("loss", "margin"),
        {},
        together=20,
    )
    chosen = leave_one_out(5000, indices=range(0, 5000, 250))
    features = torch.cat([train[0].flatten(1), torch.ones(5000, 1)], 1).double()
    convex = optima.Convex(dattri.cross_entropy, features, train[1], 10, optimum.l2)
    zero = features.new_zeros(20, 10, 785)
    shares = torch.tensor(np.stack([one.mask for one in chosen])).double() / 4999
    near = preconditioners.kronecker(convex, zero[0])
    scratch = optima.minima(convex.evaluate, zero, shares, near, optimum.gradient_norm)
    for one, state, want in zip(chosen, held.train(chosen), scratch.points, strict=True):
        assert held.gradient_norm(one, state) < 2e-11
        found = torch.cat([state["1.weight"], state["1.bias"][:, None]], 1)
        assert (found - want).abs().max() < 1e-8
