from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dattri_core as dattri
from dattri_core.laws import check

Data = tuple[Tensor, Tensor]
World = tuple[nn.Module, dattri.Task, Data, Data]


@pytest.fixture
def world() -> World:
    random = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64))

    def data(count: int) -> Data:
        inputs = torch.randn(count, 5, generator=random, dtype=torch.float64)
        return inputs, torch.randint(3, (count,), generator=random)

    return model, dattri.Task(model, "cross-entropy"), data(7), data(4)


def gradients(model: nn.Module, data: Data) -> Tensor:
    """Return one backward pass for each example, ``[n, d]``."""
    rows = []
    for inputs, label in zip(*data, strict=True):
        loss = nn.functional.cross_entropy(model(inputs[None]), label[None])
        parts = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def scores_of(world: World, method: str, **overrides: float) -> Tensor:
    _, task, train, test = world
    scores = dattri.attribute(task, train, test, method=method, **overrides)
    return torch.as_tensor(scores.values)


@pytest.mark.parametrize("powers", [(0.5, 0.5), (1.0, 0.0), (0.25, 0.75)])
def test_scores_are_those_of_a_loop_over_examples(
    world: World, powers: tuple[float, float]
) -> None:
    model, _, train, test = world
    left, right = gradients(model, train), gradients(model, test)
    norms = left.norm(dim=1)[:, None] ** powers[0] * right.norm(dim=1)[None, :] ** powers[1]
    got = scores_of(world, "grad-tempered-cos", train_power=powers[0], test_power=powers[1])
    torch.testing.assert_close(got, left @ right.T / norms, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("power", "other"), [(0.0, "grad-dot"), (1.0, "grad-cos")])
def test_the_ends_are_the_inner_product_and_the_cosine(
    world: World, power: float, other: str
) -> None:
    got = scores_of(world, "grad-tempered-cos", train_power=power, test_power=power)
    torch.testing.assert_close(got, scores_of(world, other), rtol=1e-10, atol=1e-12)


def test_a_row_that_vanishes_scores_zero(world: World) -> None:
    part = dattri.method("grad-tempered-cos").scorer
    norm, none = torch.tensor([0.0, 2.0]), {}
    side = dattri.Side(torch.arange(2), none, norm)
    got = part.finish(torch.tensor([[0.0, 0.0], [0.0, 4.0]]), side, side).values
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0], [0.0, 2.0]]))


@pytest.mark.parametrize("power", [-0.5, 2, float("nan")])
def test_a_power_outside_of_its_range_is_refused(power: float) -> None:
    with pytest.raises(dattri.SpecError, match="expected a number from 0"):
        dattri.method("grad-tempered-cos", train_power=power)


@pytest.mark.parametrize(
    ("kind", "name"), [("scorer", "tempered-cosine"), ("method", "grad-tempered-cos")]
)
def test_it_keeps_the_laws(kind: str, name: str) -> None:
    report = check(kind, name)
    assert report.ok, str(report)
