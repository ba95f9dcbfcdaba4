"""Every solver gives the same scores on models with Linear, Conv, Embedding and LayerNorm.

The oracle is dense algebra on gradients and curvature from `torch.autograd.functional` alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from oracles.dense import call, flatten, ggn_of, hessian_of, parameters_of
from torch import Tensor, nn

import dattri_core as dattri

CLASSES = 3


class Tokens(nn.Module):
    """Embedding, strided Conv1d, LayerNorm, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.convolution = nn.Conv1d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.convolution(self.embedding(tokens).mT)).mean(2)
        return self.head(self.norm(hidden))


class Images(nn.Module):
    """Strided Conv2d, Linear, LayerNorm, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 3, 3, stride=2)
        self.middle = nn.Linear(12, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.convolution(images)).flatten(1)
        return self.head(torch.tanh(self.norm(self.middle(hidden))))


def world(name: str) -> tuple[nn.Module, Any, Any]:
    """Return a model with weights of its own, train and test examples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = (Tokens() if name == "tokens" else Images()).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        count = 30
        if name == "tokens":
            inputs = torch.randint(5, (count, 6))
        else:
            inputs = torch.randn(count, 1, 6, 6, dtype=torch.float64)
        labels = torch.randint(CLASSES, (count,))
    return model, (inputs[:22], labels[:22]), (inputs[22:], labels[22:])


def losses(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


def gradients(model: nn.Module, batch: Any) -> Tensor:
    at = parameters_of(model)
    rows = []
    for x, y in zip(*batch, strict=True):
        leaf = {name: value.clone().requires_grad_() for name, value in at.items()}
        loss = losses(call(model, leaf, x[None]), y[None]).sum()
        found = torch.autograd.grad(loss, list(leaf.values()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def curvature(model: nn.Module, batch: Any, kind: str) -> Tensor:
    x, labels = batch
    at = parameters_of(model)
    if kind == "ggn":
        total = ggn_of(lambda p: call(model, p, x), lambda out: losses(out, labels), at)
    else:
        total = hessian_of(lambda p: losses(call(model, p, x), labels).sum(), at)
    assert flatten(at).numel() == len(total)
    return total / len(x)


SOLVERS = {
    "cholesky": {},
    "cg": {"tolerance": 1e-11, "maximum_iterations": 2000},
    "lissa": {"batch": None, "depth": 20_000},
    "arnoldi": {"rank": 200, "iterations": 200},
    "reduced": {"rank": 200, "iterations": 200, "reduced": True},
}


@pytest.mark.parametrize("name", ["tokens", "images"])
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_all_solvers_give_the_dense_scores(name: str, kind: str) -> None:
    model, train, test = world(name)
    matrix = curvature(model, train, kind)
    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    assert (lowest < -0.01) == (kind == "hessian")
    damping = 0.5 + max(0.0, -lowest)
    damped = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    want = gradients(model, train) @ torch.linalg.solve(damped, gradients(model, test).mT)
    task = dattri.Task(model)
    for solver, fields in SOLVERS.items():
        part = {"name": "arnoldi" if solver == "reduced" else solver, "damping": damping, **fields}
        method = dattri.Method(inverse_hessian={"curvature": kind, "solver": part})
        got = method.attribute(task, train, test).values
        gap = float((got - want).abs().max() / want.abs().max())
        assert gap < 1e-6, f"{solver}: {gap:.1e}"


@pytest.mark.parametrize("name", ["tokens", "images"])
def test_negative_eigenvalues_are_taken_by_magnitude(name: str) -> None:
    model, train, test = world(name)
    matrix = curvature(model, train, "hessian")
    values, basis = torch.linalg.eigh(matrix)
    rank = 6
    top = values.abs().argsort(descending=True)[:rank]
    assert bool((values[top] < 0).any())
    damping = 1e-2
    inside = gradients(model, train) @ basis[:, top]
    want = inside / (values[top] + damping) @ (gradients(model, test) @ basis[:, top]).mT
    for reduced in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            method = dattri.method(
                "if-arnoldi", damping=damping, rank=rank, iterations=60, reduced=reduced
            )
            got = method.attribute(dattri.Task(model), train, test).values
        gap = float((got - want).abs().max() / want.abs().max())
        assert gap < 1e-8


def test_a_sweep_over_dampings_takes_no_product_and_rows_of_k_numbers(monkeypatch: Any) -> None:
    model, train, test = world("tokens")
    task = dattri.Task(model)
    from dattri_core.problem import TrainProblem

    asked = []
    product = TrainProblem.product

    def counting(self: Any, vectors: Any, *args: Any) -> Any:
        asked.append(len(vectors))
        return product(self, vectors, *args)

    monkeypatch.setattr(TrainProblem, "product", counting)
    method = dattri.method("if-arnoldi", curvature="ggn", rank=8, iterations=20)
    fitted = method.fit(task, train)
    assert asked == [1] * 20
    for damping in (1e-3, 1e-2, 1e-1):
        swept = fitted.with_(damping=damping).attribute(test).values
        fresh = dattri.method(
            "if-arnoldi", curvature="ggn", rank=8, iterations=20, damping=damping
        ).attribute(task, train, test)
        torch.testing.assert_close(swept, fresh.values, rtol=1e-10, atol=1e-12)
    assert len(asked) == 20 * (1 + 3)
    chain = fitted._held.chain
    assert chain.space.dim == 8
    assert not chain.blockwise
    plan = method.attribute(task, train, test, dry_run=True)
    assert plan.bytes["queries"] == 8 * 8 * 8  # 8 test rows of 8 numbers of 8 bytes
