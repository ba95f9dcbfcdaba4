"""The source of any function: what refuses to run side by side is differentiated in turn."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from dattri_parts.sources.functional import Functional
from oracles.loops import loop_gradients, worst_difference
from oracles.models import Pulled
from test_per_example_safety import batch_of, bind, loss, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dattri_core as dattri


def branching(model: nn.Module, batch: Any) -> Tensor:
    values = loss(model, batch)
    return values if values.sum().item() < 1e9 else values * 2


def test_examples_that_refuse_vmap_are_differentiated_in_turn(caplog: Any) -> None:
    model, batch = mlp(), batch_of()
    with caplog.at_level(logging.INFO, logger="dattri"):
        bound = bind(model, batch, Functional(), loss=branching)
        assert worst_difference(bound, loop_gradients(model, branching, batch), batch) < 1e-12
    (said,) = [record.getMessage() for record in caplog.records]
    assert "the loss is differentiated one example after another" in said
    assert "item" in said
    moved = Functional().move(bound, bound.evaluator.checkpoint)
    assert moved.refused == {"loss"}
    assert len(bind(model, batch, loss=branching).space) == 3  # hooks do without vmap


def test_outputs_that_refuse_vmap_are_pulled_in_turn() -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        return outputs if outputs.sum().item() < 1e9 else outputs * 2

    def criterion(outputs: Tensor, batch: Any) -> Tensor:
        return (outputs * batch[1][:, None]).sin().sum(1)

    own = dattri.Loss(forward, criterion)
    model, batch = mlp(), batch_of()
    bound = bind(model, batch, Functional(), loss=own)
    pulled = Pulled(bound, own)
    assert worst_difference(pulled, loop_gradients(model, own, batch), batch) < 1e-12
    assert bound.refused == {"loss", "forward pass"}


def test_activations_that_are_computed_again_meet_the_weights_of_the_checkpoint() -> None:
    """In turn, with a weight that the model does not hold."""

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(2)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = checkpoint(self.net, x, use_reentrant=False)
            return h if h.sum().item() < 1e9 else h * 2

    model, other, batch = Again(), Again(), batch_of()
    bound = bind(model, batch, Functional(), checkpoints=other.state_dict())
    assert bound.refused == {"loss"}
    assert worst_difference(bound, loop_gradients(other, loss, batch), batch) < 1e-12


def test_a_loss_without_a_derivative_is_named() -> None:
    class Blunt(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

    def own_loss(model: nn.Module, batch: Any) -> Tensor:
        return Blunt.apply(loss(model, batch))  # type: ignore[no-any-return, no-untyped-call]

    with pytest.raises(
        dattri.InputError, match=r"the loss cannot be differentiated: .*backward.*torch.func.vmap: "
    ):
        bind(mlp(), batch_of(), Functional(), loss=own_loss)


def test_a_chunk_below_one_is_refused() -> None:
    with pytest.raises(dattri.SpecError, match="chunk is 0"):
        Functional(chunk=0)


def test_a_mean_weighted_by_classes_is_told_from_a_mean_by_all_of_the_sample():
    """The first examples of the sample have one label, and others another."""
    model = nn.Linear(4, 3).double()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 0, 2, 0, 0, 0])
    weight = torch.tensor([1.0, 1.0, 5.0], dtype=torch.float64)

    @dattri.functional
    def loss(parameters, batch):
        outputs = torch.func.functional_call(model, parameters, (batch[0],))
        return torch.nn.functional.cross_entropy(outputs, batch[1], weight=weight)

    options = {"method": "grad-dot", "source": "functional"}
    with pytest.raises(dattri.InputError, match=r"neither the mean .* nor the sum"):
        dattri.attribute(dattri.Task(model, loss), (inputs, labels), (inputs, labels), **options)
