"""A criterion that is linear in the outputs has no GGN: its inverse is 1 / damping."""

import pytest
import torch
from oracles.toy_tasks import flat_gradients, mlp, normal
from torch import nn

import dattri_core as dattri
from dattri_core import Loss, Task

DAMPING = 0.4


def linear_task():
    loss = Loss(
        forward=lambda model, batch: model(batch[0]),
        criterion=lambda outputs, batch: (outputs * batch[1]).sum(1),
    )
    return Task(mlp(), loss=loss)


def batch(count, seed):
    return normal(count, 4, seed=seed), normal(count, 3, seed=seed + 1)


@pytest.mark.parametrize(
    "method,fields",
    [
        ("if-woodbury", {}),
        ("if-woodbury", {"curvature": "leading-ggn"}),
        ("if-explicit", {"curvature": "ggn"}),
        ("if-cg", {"curvature": "ggn"}),
        ("if-datainf", {"curvature": "ggn"}),
        ("relatif-explicit", {}),
    ],
)
def test_without_a_row_the_inverse_is_that_of_the_damping(method, fields):
    task, train, test = linear_task(), batch(8, 1), batch(3, 5)
    rows, queries = (
        flat_gradients(task.model, lambda model, b=b: (model(b[0]) * b[1]).sum(1))
        for b in (train, test)
    )
    want, own = rows @ queries.T / DAMPING, rows.square().sum(1) / DAMPING
    if method == "relatif-explicit":
        want, own = want / own.sqrt()[:, None], own.sqrt()
    fitted = dattri.method(method, damping=DAMPING, **fields).fit(task, train)
    assert (fitted.attribute(test).values - want).abs().max() < 1e-12 * want.abs().max()
    assert (fitted.self_influence() - own).abs().max() < 1e-12 * own.max()


@pytest.mark.parametrize("method", ["if-woodbury", "relatif-explicit", "if-datainf"])
def test_one_class_has_no_gradient_and_no_score(method):
    """Cross entropy of a single output: loss and rows are zero."""
    task = Task(nn.Linear(3, 1).double())
    train = normal(8, 3, seed=1), torch.zeros(8).long()
    scores = dattri.attribute(task, train, train, method=method, damping=DAMPING).values
    assert not scores.any()
