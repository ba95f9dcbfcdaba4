"""The check at bind where rounding decides on which side of a kink a unit falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dattri_parts.sources.per_example import PerExample
from oracles.loops import stream_rows
from oracles.toy_rules import Twice
from torch import Tensor, nn
from torch.func import functional_call

import dattri_core as dattri
from dattri_core.registry import Registry, using

WIDTH = 4


class Rounding(nn.Module):
    """Rounds to one side next to other examples, to the other alone, as another kernel may."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (1e-12 if len(x) == 1 else -1e-12)


def network(first: type[nn.Linear] = nn.Linear) -> nn.Module:
    """Return one with two of four units of its first layer at the kink, for every example."""
    torch.manual_seed(0)
    layer = first(WIDTH, WIDTH).double()
    with torch.no_grad():
        layer.weight[:2] = 0.0
        layer.bias[:2] = 0.0
    return nn.Sequential(layer, Rounding(), nn.ReLU(), nn.Linear(WIDTH, 3)).double()


def batch_of(count: int = 5) -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def bind(model: nn.Module, own_loss: Any = loss) -> Any:
    task = dattri.Task(model, loss=own_loss)
    return PerExample().bind(task, task.checkpoints[0], dattri.take(batch_of(), slice(0, 3)))


def gradient(model: nn.Module, batch: Any, example: int) -> Tensor:
    model.zero_grad()
    loss(model, batch)[example].backward()
    first = model[0]
    return torch.cat([first.weight.grad, first.bias.grad[:, None]], 1)


def test_a_unit_at_a_kink_is_no_mismatch() -> None:
    model, batch = network(), batch_of()
    three = dattri.take(batch, slice(0, 3))
    for b in range(3):  # the same example has two gradients, by what it comes with
        alone = gradient(model, dattri.take(batch, slice(b, b + 1)), 0)
        assert (alone - gradient(model, three, b)).norm() > 0.3 * alone.norm()
    rows, _ = stream_rows(bind(model), batch)
    found = rows.blocks["0"].dense().values
    for b in range(5):
        torch.testing.assert_close(found[b], gradient(model, batch, b), rtol=1e-12, atol=1e-14)


def test_a_wrong_rule_beside_a_kink_is_found() -> None:
    own = Registry()
    own.merge(dattri.default_registry())
    own.part("layer_rule", "oracles.toy_rules.Twice", "oracles.toy_rules:WrongRule")
    with using(own), pytest.raises(dattri.InputError, match=r"rows of '0.weight' \(by .*differ"):
        bind(network(Twice))


def test_examples_that_mix_in_their_gradients_alone_are_found() -> None:
    class Mixing(nn.Module):
        """Gives each example the gradient of the mean of all, and its own value."""

        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean(0)
            return x + 3.0 * (mean - mean.detach())

    model = network()
    model[1] = nn.Sequential(Mixing(), Rounding())
    with pytest.raises(dattri.InputError, match=r"rows of '0.weight' .*mixes examples"):
        bind(model)


def test_a_functional_loss_of_one_number_gets_no_second_look() -> None:
    model = network()

    def total(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        outputs = functional_call(model, parameters, (batch[0],))
        return nn.functional.cross_entropy(outputs, batch[1], reduction="sum")

    bound = bind(model, dattri.functional(total))  # the whole model answers, an example at a time
    assert bound.space.names == ("0.weight", "0.bias", "3")
    alone = gradient(model, dattri.take(batch_of(), slice(0, 1)), 0)
    rows, _ = stream_rows(bound, batch_of())
    torch.testing.assert_close(rows.blocks["0.weight"].dense().values[0], alone[:, :-1])
    model[1] = nn.Identity()
    assert bind(model, dattri.functional(total)).space.names == ("0", "3")
