"""Experts that a mask chooses tokens for: as many as there are examples, and not one of each."""

import pytest
import torch
from dattri_parts.sources.routed import routed
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import cross_entropy

import dattri_core as dattri
from dattri_core import Evaluator, Task

COUNT, TOKENS, WIDTH = 21, 2, 4


class Experts(nn.Module):
    """Each token goes to one of two layers, by the sign of its first number."""

    def __init__(self, choose):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 5) for _ in range(2))
        self.out = nn.Linear(5, 3)
        self.choose = choose
        self.double()

    def forward(self, tokens):
        parts = tokens.new_zeros(*tokens.shape[:2], 5)
        for sign, expert in zip((1, -1), self.experts, strict=True):
            parts = self.choose(tokens, sign * tokens[..., 0] > 0, expert, parts)
        return self.out(parts.tanh().mean(1))


def by_mask(tokens, chosen, expert, parts):
    parts = parts.clone()
    parts[chosen] = expert(tokens[chosen])
    return parts


def by_index(tokens, chosen, expert, parts):
    where = chosen.flatten().nonzero().squeeze(1)
    found = expert(tokens.flatten(0, 1).index_select(0, where).contiguous())
    return parts.flatten(0, 1).index_add(0, where, found).view_as(parts)


def by_product(tokens, chosen, expert, parts):
    return torch.where(chosen.unsqueeze(-1), expert(tokens), parts)


def world():
    """Return examples with a token for each expert, but for two that no sample shows."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(COUNT, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    tokens[:, 0, 0], tokens[:, 1, 0] = 1.0, -1.0
    tokens[7, 1, 0], tokens[8, 0, 0] = 1.0, -1.0
    return tokens, torch.randint(3, (COUNT,), generator=generator)


@pytest.mark.parametrize("choose", [by_mask, by_index])
def test_rows_are_those_of_each_example_alone(choose):
    model, data = Experts(choose), world()
    rows = []
    for example, label in zip(*data, strict=True):
        value = cross_entropy(model(example[None]), label[None])
        found = torch.autograd.grad(value, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    rows = torch.stack(rows)
    found = dattri.attribute(Task(model), data, data, method="grad-dot").values
    torch.testing.assert_close(found, rows @ rows.T)


@pytest.mark.parametrize("choose", [by_mask, by_index, by_product])
def test_modules_that_are_given_whole_examples_stay(choose):
    model, (tokens, labels) = Experts(choose), world()
    task, few = Task(model), (tokens[:3], labels[:3])
    found = routed(Evaluator(task, task.checkpoints[0], few), few, ("train",))
    assert found == (set() if choose is by_product else set(model.experts))


class Flexible(nn.Module):
    """An operator of higher order between an expert and the rest."""

    def __init__(self):
        super().__init__()
        self.expert, self.heads, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, tokens):
        found = by_mask(tokens, tokens[..., 0] > 0, self.expert, torch.zeros_like(tokens))
        heads = self.heads(found).unsqueeze(1)
        return self.out(flex_attention(heads, heads, heads).mean((1, 2)))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_an_operator_of_higher_order_ends_the_looking():
    model, (tokens, labels) = Flexible(), world()
    task, few = Task(model), (tokens[:3].float(), labels[:3])
    evaluator = Evaluator(task, task.checkpoints[0], few)
    assert routed(evaluator, few, ("train",)) == {model.expert}
    assert evaluator.coarsest(few, "train") == torch.finfo(torch.float32).eps
    with torch.no_grad():  # torch's own compilation is left as it was
        assert model(few[0]).shape == (3, WIDTH)
