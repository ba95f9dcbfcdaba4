"""The models of settings and benchmarks: sizes, shapes, causality, rows and curvature products."""

import logging

import pytest
import torch
from dattri_benchmarks import models
from dattri_parts.sources.per_example import PerExample
from oracles.dense import call, flatten, ggn_of, hessian_of, parameters_of
from oracles.models import check
from torch import nn

from dattri_core import Task, causal_lm, cross_entropy
from dattri_core.evaluate import Evaluator
from dattri_core.products import batch_product


def count(model):
    return sum(p.numel() for p in model.parameters())


def tiny_resnet(norm=nn.BatchNorm2d):
    """Return a ResNet-9 of one channel whose batch norms have seen something, and a batch."""
    torch.manual_seed(0)
    model = models.resnet9(2, 1, norm).double()
    batch = torch.randn(5, 3, 8, 8).double(), torch.tensor([0, 1, 1, 0, 1])
    for _ in range(3):
        model(3 * batch[0] + 1)
    return model.eval(), cross_entropy, batch


def tiny_gpt():
    torch.manual_seed(1)
    model = models.nano_gpt(7, length=6, layers=1, width=4, heads=2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)  # of a size at which every part matters
    tokens = torch.randint(7, (5, 5))
    return model.eval(), causal_lm, (tokens, tokens)


TINY = {
    "resnet9": tiny_resnet,
    "resnet9 with group norm": lambda: tiny_resnet(models.group_norm),
    "nano_gpt": tiny_gpt,
}


def test_the_sizes_are_those_that_the_docstrings_give():
    assert count(models.resnet9(2)) == 4_825_154
    assert count(models.resnet9(10)) == 4_829_258
    assert count(models.resnet9(2, 64, models.group_norm)) == 4_825_154
    assert count(models.nano_gpt()) == 10_795_776
    assert count(models.nano_gpt(length=64)) == 10_795_776 - 192 * 384


def test_shapes():
    assert models.resnet9(10, width=4)(torch.randn(3, 3, 32, 32)).shape == (3, 10)
    model = models.nano_gpt(11, length=9, layers=2, width=8, heads=4)
    assert model(torch.randint(11, (3, 9))).shape == (3, 9, 11)
    assert model(torch.randint(11, (3, 4))).shape == (3, 4, 11)
    with pytest.raises(ValueError, match="10 tokens"):
        model(torch.randint(11, (3, 10)))
    with pytest.raises(ValueError, match="multiple of 3"):
        models.nano_gpt(width=8, heads=3)


def test_group_norm_keeps_examples_apart():
    model, _, (images, _) = tiny_resnet(models.group_norm)
    alone = torch.cat([model.train()(images[i : i + 1]) for i in range(5)])
    assert torch.allclose(model(images), alone, rtol=1e-12)
    assert torch.equal(model(images), model.eval()(images))
    assert [
        m.num_groups
        for m in models.resnet9(2, 64, models.group_norm)[3].modules()
        if isinstance(m, nn.GroupNorm)
    ] == [16, 16, 16]


def test_no_position_of_the_transformer_sees_what_comes_after_it():
    model, _, (tokens, _) = tiny_gpt()
    before = model(tokens)
    for place in range(1, 5):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 7
        after = model(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])


@pytest.mark.parametrize("name", TINY)
def test_rows_equal_autograd(name):
    check(*TINY[name]())


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_has_a_rule_of_its_own(name, caplog):
    model, loss, batch = TINY[name]()
    task = Task(model, loss)
    with caplog.at_level(logging.WARNING, logger="dattri"):
        bound = PerExample().bind(task, task.checkpoints[0], batch)
    assert all(site.rule is not None for site in bound.plan.sites)
    assert not caplog.records
    assert {b.kind for b in bound.space.blocks} == {"outer", "dense"}


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("name", TINY)
def test_curvature_products_equal_the_dense_curvature(name, kind, caplog):
    model, loss, batch = TINY[name]()
    task = Task(model, loss)
    evaluator = Evaluator(task, task.checkpoints[0], batch)
    at = parameters_of(model)
    vectors = {n: torch.randn(3, *p.shape, dtype=torch.float64) for n, p in at.items()}
    with caplog.at_level(logging.WARNING, logger="dattri"):
        found = batch_product(evaluator, batch, vectors, kind)
    assert not caplog.records  # nothing that torch.func refuses
    if kind == "ggn":
        dense = ggn_of(
            lambda p: call(model, p, batch[0]), lambda out: loss.criterion(out, batch), at
        )
    else:
        dense = hessian_of(lambda p: loss.criterion(call(model, p, batch[0]), batch).sum(), at)
    expected = flatten(vectors, 1) @ dense
    assert (flatten(found, 1) - expected).norm() < 1e-11 * expected.norm()
