"""Influence predicts what retraining does: L2 logistic regression on real data, to 1e-10."""

import pytest
import torch
from oracles.toy_tasks import dense_hessian
from sklearn.datasets import load_iris
from torch import nn

import dattri_core as dattri
from dattri_core import Task

RATE = 0.02
"""The L2 coefficient: training minimises mean loss + RATE / 2 |weights|^2, biases included."""

N_TEST = 30


def iris():
    """Return standardised features and three classes, 120 train and 30 test examples."""
    inputs, labels = (torch.as_tensor(part) for part in load_iris(return_X_y=True))
    inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).double()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs, labels = inputs[order], labels[order]
    return (inputs[N_TEST:], labels[N_TEST:]), (inputs[:N_TEST], labels[:N_TEST])


TRAIN, TEST = iris()
N = len(TRAIN[1])
EVEN = torch.full((N,), 1 / N, dtype=torch.float64)


def newton(weights, start=None):
    """Return the model that minimises sum_i weights_i loss_i + RATE / 2 |.|^2, [3, inputs + 1]."""
    inputs = torch.cat([TRAIN[0], torch.ones(N, 1, dtype=torch.float64)], 1)
    onehot = nn.functional.one_hot(TRAIN[1], 3).double()
    solution = torch.zeros(3, 5, dtype=torch.float64) if start is None else start
    for _ in range(60):
        p = (inputs @ solution.T).softmax(1)
        gradient = (weights[:, None] * (p - onehot)).T @ inputs + RATE * solution
        if gradient.norm() < 1e-12:
            break
        curve = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        hessian = torch.einsum("n,nop,ni,nj->oipj", weights, curve, inputs, inputs)
        damped = hessian.reshape(15, 15) + RATE * torch.eye(15, dtype=torch.float64)
        solution = solution - torch.linalg.solve(damped, gradient.flatten()).reshape(3, 5)
    assert gradient.norm() < 1e-10
    return solution


def model_of(solution):
    model = nn.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(solution[:, :4])
        model.bias.copy_(solution[:, 4])
    return model


def measure(target):
    """Return the target of every test example as a function of the solution."""

    def values(solution):
        outputs = TEST[0] @ solution[:, :4].T + solution[:, 4]
        log_p = outputs.log_softmax(1).gather(1, TEST[1][:, None])[:, 0]
        if target == "logit":
            return outputs.gather(1, TEST[1][:, None])[:, 0]
        if target == "margin":
            return log_p - torch.log1p(-log_p.exp())
        return -log_p

    return values


FULL = newton(EVEN)


def reweighted(i, factor):
    weights = EVEN.clone()
    weights[i] *= factor
    return newton(weights, FULL)


@pytest.fixture(scope="module")
def less_and_more():
    """Models trained with each example at 0.99 and at 1.01 of its weight."""
    return [(reweighted(i, 0.99), reweighted(i, 1.01)) for i in range(N)]


@pytest.fixture(scope="module")
def without():
    """Models trained without each example."""
    return [reweighted(i, 0.0) for i in range(N)]


def pearson(left, right):
    return float(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1])


def slope(predicted, observed):
    """Return the least squares slope of what is observed on what is predicted."""
    return float((predicted * observed).sum() / predicted.square().sum())


def predicted(method, target):
    options = {"tolerance": 1e-12, "maximum_iterations": 500} if method == "if-cg" else {}
    scores = dattri.attribute(
        Task(model_of(FULL), target=target), TRAIN, TEST, method=method, damping=RATE, **options
    )
    return scores, scores.removal_effect()


METHODS = ["if-explicit", "if-cg"]
TARGETS = [None, "logit", "margin"]


def test_the_model_is_trained_to_a_gradient_of_1e_10():
    task_model = model_of(FULL)
    loss = nn.functional.cross_entropy(task_model(TRAIN[0]), TRAIN[1])
    loss = loss + RATE / 2 * sum(p.square().sum() for p in task_model.parameters())
    grads = torch.autograd.grad(loss, list(task_model.parameters()))
    assert torch.cat([g.flatten() for g in grads]).norm() < 1e-10
    assert torch.linalg.eigvalsh(dense_hessian(task_model, TRAIN, RATE)).min() > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", TARGETS)
def test_removal_effect_is_the_derivative_of_retraining_with_less_weight(
    method, target, less_and_more
):
    """Down-weighting example i by a share e changes the target by e times its removal effect."""
    _, effect = predicted(method, target)
    values = measure(target)
    observed = torch.stack([(values(low) - values(high)) / 0.02 for low, high in less_and_more])
    assert pearson(effect, observed) >= 0.9999
    assert abs(slope(effect, observed) - 1) <= 0.01
    # Far closer in fact: a central difference is exact to second order.
    assert (effect - observed).abs().max() < 1e-3 * observed.abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", TARGETS)
def test_removal_effect_foretells_leaving_an_example_out(method, target, without):
    _, effect = predicted(method, target)
    values = measure(target)
    observed = torch.stack([values(left) - values(FULL) for left in without])
    assert pearson(effect, observed) >= 0.99
    assert 0.8 < slope(effect, observed) < 1.25


@pytest.mark.parametrize("target", TARGETS)
def test_a_positive_score_helps(target, without):
    """Without the example of the largest score a loss rises, and a logit or margin falls."""
    scores, _ = predicted("if-explicit", target)
    values = measure(target)
    direction = 1.0 if target is None else -1.0
    for j in range(N_TEST):
        for extreme, sign in ((scores.top(1, test=j), 1.0), (scores.bottom(1, test=j), -1.0)):
            change = values(without[extreme.ids[0]])[j] - values(FULL)[j]
            assert direction * sign * change > 0


def test_a_ggn_is_the_hessian_of_this_model():
    _, effect = predicted("if-explicit", None)
    task = Task(model_of(FULL))
    ggn = dattri.attribute(
        task,
        TRAIN,
        TEST,
        method="if-cg",
        curvature="ggn",
        damping=RATE,
        tolerance=1e-12,
        maximum_iterations=500,
    )
    assert (ggn.removal_effect() - effect).abs().max() < 1e-8 * effect.abs().max()
