"""Rows of both sides after all stages: their inner products are the scores."""

import pytest
import torch
from torch import nn

import dattri_core as dattri


def world():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    train = torch.randn(40, 4, dtype=torch.float64), torch.randint(3, (40,))
    test = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    return dattri.Task(model), train, test


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("grad-dot", {}),
        ("logra", {"rank": 2}),
        ("if-explicit", {"curvature": "ggn", "damping": 0.1}),
        ("if-ekfac", {}),
        ("if-explicit", {"curvature": "ggn", "damping": 0.1, "form": "two-sided"}),
        ("if-arnoldi", {"curvature": "ggn", "rank": 5, "iterations": 10, "reduced": True}),
    ],
)
def test_their_inner_products_are_the_scores(name, overrides):
    task, train, test = world()
    if "form" in overrides:
        inverse = {"curvature": "ggn", "solver": {"name": "cholesky", "damping": 0.1}}
        method = dattri.Method(inverse_hessian={**inverse, "form": "two-sided"})
    else:
        method = dattri.method(name, **overrides)
    fitted = method.fit(task, train, progress=False)
    left, right = list(fitted.train_rows()), list(fitted.test_rows(test))
    assert torch.cat([rows.index for rows in left]).tolist() == list(range(40))
    assert torch.cat([rows.index for rows in right]).tolist() == list(range(6))
    product = torch.cat([r.flat() for r in left]) @ torch.cat([r.flat() for r in right]).T
    torch.testing.assert_close(product, fitted.attribute(test).values, rtol=1e-9, atol=1e-11)


def test_they_come_in_batches_that_fit():
    torch.manual_seed(0)
    task = dattri.Task(nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 3)).double())
    train = torch.randn(1100, 4, dtype=torch.float64), torch.randint(3, (1100,))
    few = dattri.method("grad-dot").fit(task, train, memory="1MiB", progress=False)
    parts = list(few.train_rows())
    whole = list(dattri.method("grad-dot").fit(task, train, progress=False).train_rows())
    assert len(parts) > len(whole) == 2  # at most 1024 at once
    assert torch.cat([rows.index for rows in parts]).tolist() == list(range(1100))
    flat = [torch.cat([rows.flat() for rows in some]) for some in (parts, whole)]
    torch.testing.assert_close(*flat)


def test_several_checkpoints_have_no_rows_in_common():
    task, train, _ = world()
    states = [task.model.state_dict()] * 2
    fitted = dattri.method("grad-dot").fit(dattri.Task(task.model, checkpoints=states), train)
    with pytest.raises(dattri.SpecError, match="train rows: the method has 2 checkpoints"):
        next(fitted.train_rows())
