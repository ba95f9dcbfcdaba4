"""The models of settings and benchmarks: sizes, shapes, causality, rows and curvature products."""

import copy
import logging
from functools import partial

import pytest
import torch
from dattri_benchmarks import models
from dattri_benchmarks.models.music_transformer import RelativeAttention, sinusoids, skew
from dattri_parts.sources.per_example import PerExample
from oracles.dense import call, flatten, ggn_of, hessian_of, parameters_of
from oracles.models import check
from torch import nn

from dattri_core import Task, causal_lm, cross_entropy
from dattri_core.evaluate import Evaluator
from dattri_core.products import batch_product


def count(build, *sizes, **options):
    with torch.device("meta"):  # no memory, no time
        return sum(p.numel() for p in build(*sizes, **options).parameters())


def tiny_resnet(norm=nn.BatchNorm2d):
    """Return a ResNet-9 of one channel whose batch norms have seen something, and a batch."""
    torch.manual_seed(0)
    model = models.resnet9(2, 1, norm).double()
    batch = torch.randn(5, 3, 8, 8).double(), torch.tensor([0, 1, 1, 0, 1])
    for _ in range(3):
        model(3 * batch[0] + 1)
    return model.eval(), cross_entropy, batch


def tiny_language_model(build, **options):
    """Return a transformer on sequences of 5 tokens, shorter than it could take, and a batch."""
    torch.manual_seed(1)
    model = build(7, length=6, width=4, heads=2, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)  # of a size at which every part matters
    tokens = torch.randint(7, (5, 5))
    return model.eval(), causal_lm, (tokens, tokens)


LANGUAGE = {
    "nano_gpt": partial(tiny_language_model, models.nano_gpt, layers=1),
    "nano_gpt, as published": partial(
        tiny_language_model, models.nano_gpt, layers=1, bias=False, tied=True
    ),
    "gpt2": partial(tiny_language_model, models.gpt2, layers=1),
    # two layers, which share the table of distances
    "music_transformer": partial(tiny_language_model, models.music_transformer, layers=2, hidden=3),
}
TINY = {
    "resnet9": tiny_resnet,
    "resnet9 with group norm": partial(tiny_resnet, models.group_norm),
    **LANGUAGE,
}


def test_the_sizes_are_those_that_the_docstrings_give():
    assert count(models.resnet9, 2) == 4_825_154
    assert count(models.resnet9, 10) == 4_829_258
    assert count(models.resnet9, 2, 64, models.group_norm) == 4_825_154
    assert count(models.nano_gpt) == 10_795_776
    assert count(models.nano_gpt, length=64) == 10_795_776 - 192 * 384
    assert count(models.nano_gpt, bias=False, tied=True) == 10_745_088
    assert count(models.gpt2) == 124_439_808  # as of the published weights
    assert count(models.gpt2, 33_278, 512) == 111_006_720
    assert count(models.music_transformer) == 13_277_572


def test_shapes():
    assert models.resnet9(10, width=4)(torch.randn(3, 3, 32, 32)).shape == (3, 10)
    for build in (models.nano_gpt, models.gpt2, models.music_transformer):
        model = build(11, length=9, layers=2, width=8, heads=4)
        assert model(torch.randint(11, (3, 9))).shape == (3, 9, 11)
        assert model(torch.randint(11, (3, 4))).shape == (3, 4, 11)
        with pytest.raises(ValueError, match="10 tokens"):
            model(torch.randint(11, (3, 10)))
        with pytest.raises(ValueError, match="multiple of 3"):
            build(width=8, heads=3)


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


@pytest.mark.parametrize("name", LANGUAGE)
def test_no_position_of_a_transformer_sees_what_comes_after_it(name):
    model, _, (tokens, _) = LANGUAGE[name]()
    before = model(tokens)
    for place in range(1, 5):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 7
        after = model(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place])


@pytest.mark.parametrize("length", [1, 2, 5])
def test_skewing_turns_distances_into_positions(length):
    x = torch.randn(2, 3, length, length)
    y = skew(x)
    for i in range(length):
        for j in range(i + 1):
            assert torch.equal(y[..., i, j], x[..., i, length - 1 - (i - j)])


def test_relative_attention_equals_a_loop_over_pairs():
    """softmax_j((q_i . k_j + q_i . e_(i - j)) / sqrt(d)) v_j, one pair and head at a time."""
    torch.manual_seed(2)
    width, heads, length = 6, 2, 5
    size = width // heads
    attention = RelativeAttention(width, heads, 8).double()
    x = torch.randn(3, length, width, dtype=torch.float64)
    table = torch.randn(8, width, dtype=torch.float64)  # row d: of distance d
    far = torch.arange(length - 1, -1, -1)
    found = attention(x, table[far].expand(3, length, width))
    query, key, value = attention.mix(x).split(width, 2)
    mixed = torch.zeros_like(x)
    for b in range(3):
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            for i in range(length):
                q = query[b, i, own]
                logits = torch.stack(
                    [q @ key[b, j, own] + q @ table[i - j, own] for j in range(i + 1)]
                )
                weights = (logits / size**0.5).softmax(0)
                mixed[b, i, own] = weights @ value[b, : i + 1, own]
    assert (found - attention.out(mixed)).abs().max() < 1e-14


def test_a_row_of_the_table_is_of_one_distance():
    """Of distance d speak positions that have a forerunner d before them, and no others."""
    model, _, (tokens, _) = LANGUAGE["music_transformer"]()
    before = model(tokens)
    for distance in range(6):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.distance.weight[distance] += 1.0
        moved = (changed(tokens) - before).abs().amax((0, 2)) > 1e-9
        assert moved.tolist() == [i > 0 and i >= distance for i in range(5)]


def test_sinusoids_turn_by_the_same_angle_at_every_step():
    waves = sinusoids(10, 6).double()
    assert torch.equal(waves[0], torch.tensor([0.0, 0, 0, 1, 1, 1], dtype=torch.float64))
    products = waves @ waves.T  # a sum of cosines of the distance
    assert (products[1:, 1:] - products[:-1, :-1]).abs().max() < 1e-6
    torch.testing.assert_close(
        waves[1, :3].asin(), torch.tensor([1, 10 ** (-4 / 3), 10 ** (-8 / 3)]).double()
    )


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
