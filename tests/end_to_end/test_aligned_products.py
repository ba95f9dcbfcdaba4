"""Products that are widened for tensor cores and cut again: the same scores, here on the CPU."""

from __future__ import annotations

import pytest
import torch
from dattri_benchmarks.models import nano_gpt
from torch import nn

import dattri_core as dattri
from dattri_core.blocks import inputs

METHODS = [
    "grad-dot",
    "grad-cos",
    "if-ekfac",
    "if-kfac",
    "if-datainf",
    "if-diagonal",
    "if-woodbury",
    "logra",
    "factgrass",
    "grass",
    "relatif-ekfac",
]


class Images(nn.Module):
    """Convolutions, one of them in groups, and layers of odd widths."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2), nn.Tanh(), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Linear(36, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.features(x))
        return found


def images(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 7, 7, generator=generator), torch.randint(
        0, 3, (count,), generator=generator
    )


def sequences(count: int, seed: int):
    drawn = torch.randint(0, 11, (count, 6), generator=torch.Generator().manual_seed(seed))
    return drawn, drawn


@pytest.fixture
def widening(monkeypatch: pytest.MonkeyPatch):
    """Return what lets all products be widened, and counts them."""
    seen: list[bool] = []
    aligned = inputs.aligned

    def counted(left, right):
        wide = aligned(left, right)
        seen.append(wide[0].shape != left.shape or wide[1].shape != right.shape)
        return wide

    def switch() -> list[bool]:
        monkeypatch.setattr(inputs, "has_tensor_cores", lambda values: True)
        monkeypatch.setattr(inputs, "_rounds", lambda: True)
        monkeypatch.setattr(inputs, "WIDENS", False)
        monkeypatch.setattr(inputs, "aligned", counted)
        return seen

    return switch


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["images", "sequences"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_do_not_show_it(name, kind, dtype, widening) -> None:
    torch.manual_seed(0)
    if kind == "images":
        model, make, loss = Images(), images, "cross-entropy"
    else:
        model, make, loss = nano_gpt(11, 6, 2, 6, 2), sequences, "causal-lm"
    if dtype != torch.float32:
        model = model.to(dtype)
    task = dattri.Task(model.eval(), loss)
    train, test = make(12, 1), make(5, 2)
    if kind == "images" and dtype != torch.float32:
        train, test = (train[0].to(dtype), train[1]), (test[0].to(dtype), test[1])
    changes = {"damping": 1.0} if name in ("logra", "if-woodbury") else {}
    if name == "logra":
        changes["projector"] = {"name": "kronecker", "rank": 3}
    method = dattri.method(name, **changes)
    want = torch.as_tensor(method.attribute(task, train, test).values)
    seen = widening()
    found = torch.as_tensor(method.attribute(task, train, test).values)
    assert any(seen) or name in ("if-diagonal", "grass")
    scale = float(want.abs().max())
    torch.testing.assert_close(found, want, rtol=0, atol=2e-3 * scale)
