from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dattri_core as dattri
from dattri_core.laws import Case, cases

Data = tuple[Tensor, Tensor]
OPERATORS = ["ggn", "hessian", "empirical-fisher", "kfac", "ekfac"]


@pytest.fixture
def curvlinops() -> Any:
    return pytest.importorskip(
        "curvlinops", reason="curvlinops is not installed: pip install curvlinops-for-pytorch"
    )


def numbers(*shape: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def world(loss: str) -> tuple[dattri.Task, Data, Data]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def data(count: int, seed: int) -> Data:
        inputs = numbers(count, 4, seed=seed)
        if loss == "squared-error":
            return inputs, numbers(count, 3, seed=seed + 1)
        return inputs, torch.arange(count) % 3

    return dattri.Task(model, loss=loss), data(20, 1), data(6, 5)


def scores(loss: str, curvature: Any, **changes: Any) -> Tensor:
    task, train, test = world(loss)
    inverse = {"curvature": curvature, "solver": {"name": "cholesky", "damping": 0.05}, **changes}
    made = dattri.method("if-explicit", inverse_hessian=inverse)
    return torch.as_tensor(made.attribute(task, train, test, progress=False).values)


OURS: dict[str, Any] = {
    "ggn": "ggn",
    "hessian": "hessian",
    "empirical-fisher": "gauss-newton",
    "kfac": {"name": "kfac", "fisher": "ggn"},
    "ekfac": {"name": "ekfac", "fisher": "ggn"},
}


@pytest.mark.parametrize("loss", ["cross-entropy", "squared-error"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_scores_are_those_of_the_curvature_of_the_same_name(
    curvlinops: Any, operator: str, loss: str
) -> None:
    got = scores(loss, {"name": "curvlinops", "operator": operator})
    want = scores(loss, OURS[operator])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_iterative_solvers_take_it_too(curvlinops: Any) -> None:
    solver = {"name": "cg", "damping": 0.05, "tolerance": 1e-10}
    got = scores("cross-entropy", {"name": "curvlinops", "operator": "ggn"}, solver=solver)
    torch.testing.assert_close(got, scores("cross-entropy", "ggn"), rtol=1e-6, atol=1e-8)


def test_the_model_is_left_as_it_was(curvlinops: Any) -> None:
    task, train, test = world("cross-entropy")
    task.model[0].bias.requires_grad_(False)
    task = dattri.Task(task.model.train())
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    dattri.attribute(task, train, test, method="if-curvlinops", progress=False)
    assert task.model.training
    assert not task.model[0].bias.requires_grad
    assert all(torch.equal(before[name], v) for name, v in task.model.state_dict().items())


def test_rows_that_are_no_gradients_are_refused() -> None:
    with pytest.raises(dattri.SpecError, match="no gradients of the model's parameters"):
        dattri.method("if-curvlinops", projector="rademacher")


def test_layers_that_kfac_does_not_know_are_named(curvlinops: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    data = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(dattri.SpecError, match=r"the blocks \['1.*leave them out with parameters="):
        dattri.attribute(dattri.Task(model), data, data, method="if-curvlinops", operator="ekfac")


def test_batches_of_dicts_are_those_of_pairs(curvlinops: Any) -> None:
    model, (inputs, labels) = nn.Linear(4, 3).double(), world("cross-entropy")[1]
    named = {"input": inputs, "labels": labels}
    scores_ = [
        dattri.attribute(dattri.Task(model), data, data, method="if-curvlinops", progress=False)
        for data in ((inputs, labels), named)
    ]
    torch.testing.assert_close(*(torch.as_tensor(s.values) for s in scores_))


def test_batches_of_other_kinds_are_refused(curvlinops: Any) -> None:
    model = nn.Bilinear(4, 4, 3)
    data = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(dattri.InputError, match="a batch is a tuple of 3; expected a pair"):
        dattri.attribute(dattri.Task(model), data, data, method="if-curvlinops")


def test_without_the_library_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    task, train, test = world("cross-entropy")
    with pytest.raises(dattri.InputError, match="pip install curvlinops-for-pytorch"):
        dattri.attribute(task, train, test, method="if-curvlinops", progress=False)


@pytest.mark.parametrize("case", cases("dattri-curvlinops"), ids=str)
def test_law(curvlinops: Any, case: Case) -> None:
    finding = case.run()
    if finding.status in ("skipped", "expected"):
        pytest.skip(finding.detail)
    assert finding.status == "passed", finding.detail
