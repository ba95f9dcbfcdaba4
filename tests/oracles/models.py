"""Models from parts, losses that see every entry, and the comparison of rows with the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import frozen
from dattri_parts.sources.per_example import PerExample
from torch import Tensor, nn
from torch.nn import functional

import dattri_core as dattri
from oracles.loops import loop_gradients, worst_difference

TOLERANCE = 1e-10
WORDS, WIDTH, LENGTH = 7, 6, 5


def _vector_criterion(out: Tensor, batch: Any) -> Tensor:
    return ((out.flatten(1) * batch[1][:, None]).sin() * weights_like(out)).sum(1)


def weights_like(out: Tensor) -> Tensor:
    return torch.linspace(0.3, 1.7, out[0].numel(), dtype=out.dtype, device=out.device)


def _token_criterion(logits: Tensor, batch: Any) -> Tensor:
    labels = batch[1]
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.reshape(labels.shape).sum(1)


def _outputs(model: nn.Module, batch: Any) -> Tensor:
    answer: Tensor = model(batch[0])
    return answer


vector_loss = dattri.Loss(_outputs, _vector_criterion, "vector")
token_loss = dattri.Loss(_outputs, _token_criterion, "token")


def vectors(count: int = 5, *shape: int) -> Any:
    shape = shape or (WIDTH,)
    return torch.randn(count, *shape).double(), torch.rand(count).double() + 0.5


def tokens(count: int = 5) -> Any:
    return torch.randint(WORDS, (count, LENGTH)), torch.randint(WORDS, (count, LENGTH))


def bind(
    model: nn.Module, loss: Any, batch: Any, patterns: Any = "*", source: Any = None
) -> tuple[Any, Any]:
    """Return the bound source and the expected gradients of the selected parameters."""
    task = dattri.Task(model, loss=loss, parameters=patterns)
    bound = (source or PerExample()).bind(
        task, task.checkpoints[0], dattri.take(batch, slice(0, 3))
    )
    expected = loop_gradients(model, loss, batch)
    return bound, {name: expected[name] for name in task.parameter_names}


def check(model: nn.Module, loss: Any, batch: Any, patterns: Any = "*", device: str = "cpu") -> Any:
    """Compare with the loop on the whole batch, and on batches of one and of two."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = model.double().to(device)
    batch = dattri.map_tensors(lambda t: t.to(device), batch)
    bound, expected = bind(model, loss, batch, patterns)
    assert max(g.abs().max().item() for g in expected.values()) > 1e-3  # there is something to see
    for part in (slice(None), slice(1, 2), slice(3, 5)):
        mine = {name: grads[part] for name, grads in expected.items()}
        assert worst_difference(bound, mine, dattri.take(batch, part)) <= TOLERANCE
        if isinstance(loss, dattri.Loss):
            pulled = Pulled(bound, loss)
            assert worst_difference(pulled, mine, dattri.take(batch, part)) <= TOLERANCE
    return bound


@frozen(eq=False)
class Pulled:
    """A source whose rows are the slopes of the criterion, pulled back: those of the loss."""

    bound: Any
    loss: dattri.Loss

    @property
    def space(self) -> Any:
        return self.bound.space

    @property
    def evaluator(self) -> Any:
        return self.bound.evaluator

    def stream(self, batch: Any, role: str, sink: Any) -> Any:
        def slope(outputs: Tensor) -> Tensor:
            free = outputs.clone().requires_grad_()
            return torch.autograd.grad(self.loss.criterion(free, batch).sum(), free)[0]

        assert role == "train"
        self.bound.pull(batch, slope, sink)
        return {}


class Model(nn.Module):
    """A model from parts and a function of them."""

    def __init__(self, run: Any, **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def linear(inputs: int = WIDTH, outputs: int = WIDTH, **options: Any) -> nn.Linear:
    return nn.Linear(inputs, outputs, **options)
