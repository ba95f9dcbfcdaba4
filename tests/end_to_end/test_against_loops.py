"""Gradient methods and influence functions against loops and dense float64 algebra."""

import pytest
import torch
from oracles.toy_tasks import cross_entropies, dense_hessian, examples, flat_gradients, mlp, states
from torch import nn

import dattri_core as dattri
from dattri_core import Task

N, M = 23, 9
TRAIN, TEST = examples(N), examples(M, seed=300)
RATES = [0.5, 0.25, 2.0]


def relative(left, right):
    return float((left - right).abs().max() / right.abs().max())


def logits(batch):
    return lambda model: model(batch[0]).gather(1, batch[1][:, None])[:, 0]


def margins(batch):
    def values(model):
        p = model(batch[0]).softmax(1).gather(1, batch[1][:, None])[:, 0]
        return torch.log(p / (1 - p))

    return values


# What a target reads, and its sign: a positive score helps.
TARGETS = {None: (cross_entropies, 1.0), "logit": (logits, -1.0), "margin": (margins, -1.0)}


def sides(model, target=None):
    values, sign = TARGETS[target]
    return flat_gradients(model, cross_entropies(TRAIN)), sign * flat_gradients(model, values(TEST))


@pytest.mark.parametrize("target", TARGETS)
def test_grad_dot_is_the_inner_product_of_the_gradients(target):
    g, h = sides(mlp(), target)
    got = dattri.attribute(Task(mlp(), target=target), TRAIN, TEST, method="grad-dot")
    assert relative(got.values, g @ h.T) < 1e-12


@pytest.mark.parametrize("target", TARGETS)
def test_grad_cos_is_their_cosine(target):
    g, h = sides(mlp(), target)
    got = dattri.attribute(Task(mlp(), target=target), TRAIN, TEST, method="grad-cos").values
    want = nn.functional.cosine_similarity(g[:, None], h[None], dim=2)
    assert (got - want).abs().max() < 1e-12
    assert (
        dattri.attribute(Task(mlp()), TRAIN, TRAIN, "grad-cos").values.diagonal().min() > 1 - 1e-9
    )


def test_tracin_is_the_sum_over_checkpoints_of_learning_rate_times_product():
    want = torch.zeros(N, M, dtype=torch.float64)
    for seed, rate in zip((0, 50, 100), RATES, strict=True):
        g, h = sides(mlp(seed=seed))
        want += rate * g @ h.T
    task = Task(mlp(), checkpoints=states(3), learning_rates=RATES)
    assert relative(dattri.attribute(task, TRAIN, TEST, method="tracin").values, want) < 1e-12


def test_a_positive_gradient_product_lowers_the_loss_after_a_step():
    """One small step on example i changes the loss of j by -rate * score, to first order."""
    rate = 1e-6
    scores = dattri.attribute(Task(mlp()), TRAIN, TEST, method="grad-dot").values
    before = cross_entropies(TEST)(mlp()).detach()
    for i in (0, 7):
        model = mlp()
        single = tuple(t[i : i + 1] for t in TRAIN)
        cross_entropies(single)(model).sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad
        change = cross_entropies(TEST)(model).detach() - before
        assert relative(-change / rate, scores[i]) < 1e-3


def trained():
    """Return weights at which the mean loss is nearly flat: the Hessian is all but positive."""
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = cross_entropies(TRAIN)(model).mean()
        loss = loss + 0.01 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


@pytest.mark.parametrize("method", ["if-explicit", "if-cg"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("damping", [0.02, 1.0])
def test_influence_is_a_dense_solve_with_the_hessian_of_the_mean_loss(method, target, damping):
    model = trained()
    g, h = sides(model, target)
    hessian = dense_hessian(model, TRAIN)
    damped = hessian + damping * torch.eye(len(hessian), dtype=torch.float64)
    want = g @ torch.linalg.solve(damped, h.T)
    options = {"tolerance": 1e-13, "maximum_iterations": 1000} if method == "if-cg" else {}
    task = Task(model, target=target)
    got = dattri.attribute(task, TRAIN, TEST, method=method, damping=damping, **options)
    assert relative(got.values, want) < 1e-8
    cosine = dattri.attribute(
        task, TRAIN, TEST, method=method, damping=damping, scorer="cosine", **options
    )
    solved = torch.linalg.solve(damped, h.T).T
    cosines = nn.functional.cosine_similarity(g[:, None], solved[None], dim=2)
    assert (cosine.values - cosines).abs().max() < 1e-8


@pytest.mark.parametrize("method", ["if-explicit", "if-cg"])
def test_influence_of_some_parameters_uses_their_block_of_the_hessian(method):
    model = trained()
    block = slice(25, 40)  # 2.weight
    g, h = (side[:, block] for side in sides(model))
    damped = dense_hessian(model, TRAIN)[block, block] + 0.05 * torch.eye(15, dtype=torch.float64)
    want = g @ torch.linalg.solve(damped, h.T)
    options = {"tolerance": 1e-13, "maximum_iterations": 1000} if method == "if-cg" else {}
    task = Task(model, parameters="2.weight")
    got = dattri.attribute(task, TRAIN, TEST, method=method, damping=0.05, **options)
    assert relative(got.values, want) < 1e-8


def test_influence_with_an_indefinite_hessian_is_that_of_the_dense_inverse():
    """Untrained weights: some eigenvalues are negative; the explicit inverse is exact."""
    model = mlp(seed=5)
    g, h = sides(model)
    hessian = dense_hessian(model, TRAIN)
    values = torch.linalg.eigvalsh(hessian)
    damping = 1e-2
    assert values.min() < -5 * damping
    assert (values + damping).abs().min() > 1e-5
    want = g @ torch.linalg.solve(hessian + damping * torch.eye(len(hessian)).double(), h.T)
    got = dattri.attribute(Task(model), TRAIN, TEST, method="if-explicit", damping=damping)
    assert relative(got.values, want) < 1e-8


def test_a_ggn_of_a_linear_model_is_its_hessian():
    model = mlp(sizes=(4, 3))
    task = Task(model)
    options = {"method": "if-explicit", "damping": 0.1}
    hessian = dattri.attribute(task, TRAIN, TEST, **options)
    ggn = dattri.attribute(task, TRAIN, TEST, curvature="ggn", **options)
    assert relative(ggn.values, hessian.values) < 1e-10
