"""Solvers know to how many digits a model computes, also where its rows have more."""

from __future__ import annotations

import warnings

import pytest
import torch
from dattri_parts.solvers.cholesky import Cholesky
from dattri_parts.solvers.factor import precision_of
from oracles.dense import MatrixOperator, symmetric
from torch import nn

import dattri_core as dattri
from dattri_core import NumericsError, RoundedOperator, Task

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
METHODS = ["if-woodbury", "if-explicit"]


class Coarse(MatrixOperator):
    """A matrix that is known to a quarter of its largest eigenvalue."""

    def precision(self) -> float:
        return 0.25


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)


class Adapted(nn.Module):
    """A frozen layer in one dtype, and what is learned on it in another one."""

    def __init__(self, base: torch.dtype, own: torch.dtype) -> None:
        super().__init__()
        self.base = nn.Linear(10, 16, dtype=base).requires_grad_(False)
        self.down = nn.Linear(10, 3, bias=False, dtype=own)
        self.up = nn.Linear(3, 16, bias=False, dtype=own)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = self.up(self.down(x.to(self.down.weight.dtype)))
        found: torch.Tensor = self.base(x.to(self.base.weight.dtype)) + change.to(
            self.base.weight.dtype
        )
        return found


class Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", BF16):
            found: torch.Tensor = self.model(x)
        return found.float()


def layers(first: torch.dtype, second: torch.dtype, end: torch.dtype) -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 16, dtype=first),
        nn.Tanh(),
        Cast(second),
        nn.Linear(16, 4, dtype=second),
        Cast(end),
    )


def adapters(base: torch.dtype, own: torch.dtype, end: torch.dtype) -> nn.Module:
    return nn.Sequential(
        Adapted(base, own), nn.Tanh(), nn.Linear(16, 4, dtype=base).requires_grad_(False), Cast(end)
    )


MODELS = {
    "a layer in bfloat16": lambda: layers(F32, BF16, F32),
    "adapters on bfloat16": lambda: adapters(BF16, F32, F32),
    "an autocast": lambda: Autocast(layers(F32, F32, F32)),
}
SAME = {"a layer in bfloat16": layers, "adapters on bfloat16": adapters, "an autocast": layers}
"""What makes them in one dtype."""


def data(dtype: torch.dtype, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 10, generator=random)
    return inputs.to(dtype), torch.randint(0, 4, (count,), generator=random)


def attribute(model: nn.Module, dtype: torch.dtype, method: str, damping: float) -> dattri.Scores:
    options = {"curvature": "ggn"} if method == "if-explicit" else {}
    return dattri.attribute(
        Task(model),
        data(dtype, 60, 0),
        data(dtype, 6, 1),
        method=method,
        damping=damping,
        progress=False,
        **options,
    )


def made(name: str, dtype: torch.dtype = F64) -> tuple[nn.Module, nn.Module]:
    """Return a model, and the one in one dtype with its weights."""
    torch.manual_seed(0)
    model, same = MODELS[name](), SAME[name](dtype, dtype, dtype)
    weights = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    same.load_state_dict(weights)
    return model, same


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_a_damping_that_is_lost_in_rounding_is_refused(name: str, method: str) -> None:
    model, same = made(name, F32)
    with pytest.raises(NumericsError, match=r"is\s+known to 0\.008 of its largest"):
        attribute(model, F32, method, 1e-5)
    assert attribute(same, F32, method, 1e-5).values.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_what_rounding_leaves_of_scores_is_said_and_holds(name: str) -> None:
    model, same = made(name)
    damping = 0.1
    with pytest.warns(RuntimeWarning, match="scores may be off by"):
        found = attribute(model, F32, "if-woodbury", damping)
    want = attribute(same, F64, "if-woodbury", damping).values
    lengths = [
        dattri.method("grad-dot").fit(Task(same), data(F64, count, seed)).self_influence().sqrt()
        for count, seed in ((60, 0), (6, 1))
    ]
    unit = lengths[0][:, None] * lengths[1] / damping
    off = ((found.values.double() - want).abs() / unit).max()
    assert 1e-4 < float(off) <= found.provenance["solver"][0]["rounding"]


@pytest.mark.parametrize("name", MODELS)
def test_conjugate_gradients_say_when_answers_are_rounding(name: str) -> None:
    model, same = made(name, F32)
    with pytest.warns(dattri.ConvergenceWarning, match=r"rounded to, 0\.008 of eigenvalues"):
        attribute(model, F32, "if-cg", 1e-5)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        attribute(same, F32, "if-cg", 1e-5)
        attribute(model, F32, "if-cg", 0.5)
    assert not [w for w in heard if "rounded to" in str(w.message)]


class Uneven(Coarse):
    """Every second product is off by as much as the matrix is known to."""

    calls = 0

    def apply(self, rows: dattri.Rows) -> dattri.Rows:
        self.calls += 1
        found = super().apply(rows).flat()
        noise = 0.2 * rows.flat().roll(1, 1) * (self.calls % 2)
        return dattri.Rows.from_flat(rows.space, found + noise, rows.index)


def test_steps_of_a_series_that_grow_by_rounding_are_no_divergence() -> None:
    matrix = symmetric(torch.linspace(0.1, 1.0, 6), 0)
    rows = dattri.Rows.from_flat(
        MatrixOperator(matrix).space, torch.eye(6, dtype=F64), torch.arange(6)
    )
    solver = dattri.default_registry().make(
        "solver", "lissa", damping=0.1, depth=60, batch=None, scale=1.2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dattri.ConvergenceWarning)
        found = solver.solve_for(Uneven(matrix), torch.device("cpu")).apply(rows).flat()
    want = torch.linalg.inv(matrix + 0.1 * torch.eye(6, dtype=F64))
    assert (found - want).norm() < 0.5 * want.norm()


def test_who_is_asked() -> None:
    """An operator that says more of its rounding than its dtype does is believed."""

    matrix = symmetric(torch.linspace(0.1, 1.0, 6), 0)
    assert isinstance(Coarse(matrix), RoundedOperator)
    assert precision_of(Coarse(matrix)) == 0.25
    assert precision_of(MatrixOperator(matrix)) == torch.finfo(F64).eps
    with pytest.raises(NumericsError, match=r"known to 0\.2 of its largest"):
        Cholesky(dattri.Damping(0.1)).solve_for(Coarse(matrix), torch.device("cpu"))


def test_a_model_in_one_dtype_is_judged_by_it() -> None:
    torch.manual_seed(0)
    model = layers(F32, F32, F32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = attribute(model, F32, "if-woodbury", 0.1)
    assert found.provenance["solver"][0]["rounding"] < 1e-5


def test_arnoldi_refuses_what_it_cannot_tell_from_zero() -> None:
    """One direction is kept whose eigenvalue the damping takes to less than its rounding."""
    model, _ = made("a layer in bfloat16")
    method = dattri.method("if-arnoldi", iterations=12, rank=1, damping=0.01, curvature="ggn")
    fitted = method.fit(Task(model), data(F32, 60, 0))
    largest = fitted.stats[0]["largest_eigenvalue"]
    with pytest.raises(NumericsError, match=r"known to 0\.008 of its largest"):
        dattri.method(
            "if-arnoldi", iterations=12, rank=12, damping=largest * 1e-4, curvature="ggn"
        ).fit(Task(model), data(F32, 60, 0))
