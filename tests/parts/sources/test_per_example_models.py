"""Whole models: shared and frozen weights, attention, modules without a rule, losses, precision."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from dattri_parts.sources.functional import Functional
from dattri_parts.sources.per_example import PerExample
from oracles.devices import DEVICES
from oracles.loops import loop_gradients, stream_rows, worst_difference
from oracles.models import (
    LENGTH,
    TOLERANCE,
    WIDTH,
    WORDS,
    Model,
    bind,
    check,
    linear,
    token_loss,
    tokens,
    vector_loss,
    vectors,
    weights_like,
)
from torch import Tensor, nn
from torch.nn import functional

import dattri_core as dattri
from dattri_core.lift import to_parameters
from dattri_core.shipped_losses import true_margin


def gradient_of(bound: Any, batch: Any) -> dict[str, Tensor]:
    return to_parameters(stream_rows(bound, batch)[0])


# --- shared weights -----------------------------------------------------------------------------
def test_a_module_used_several_times() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.a(m.a(m.a(x).tanh()).tanh()) + m.norm(m.norm(x))

    bound = check(Model(run, a=linear(), norm=nn.LayerNorm(WIDTH)), vector_loss, vectors())
    rows, _ = stream_rows(bound, vectors())
    assert rows.blocks["a"].positions == 3  # one after another along T


def test_a_module_on_two_shapes() -> None:
    def run(m: Any, x: Tensor) -> Tensor:  # [B, T, D], [B, D] and [T, B, D]
        return m.a(x).sum(1) + m.a(x.mean(1)) + m.a(x.transpose(0, 1)).cos().sum(0)

    check(Model(run, a=linear()), vector_loss, vectors(5, 4, WIDTH))


@pytest.mark.parametrize("order", ["embedding first", "head first"])
@pytest.mark.parametrize("bias", [True, False])
def test_embedding_tied_to_head(order: str, bias: bool) -> None:
    parts = {"words": nn.Embedding(WORDS, WIDTH), "head": linear(WIDTH, WORDS, bias=bias)}
    if order == "head first":
        parts = dict(reversed(parts.items()))
    model = Model(lambda m, x: m.head(m.words(x).tanh()), **parts)
    model.head.weight = model.words.weight
    bound = check(model, token_loss, tokens())
    name, shape = (
        ("words.weight", (WIDTH, WORDS))
        if order == "embedding first"
        else ("head.weight", (WORDS, WIDTH))
    )
    assert bound.space[name].shape == shape
    assert bound.space.names == ((name, "head.bias") if bias else (name,))
    rows, _ = stream_rows(bound, tokens())
    assert rows.blocks[name].positions == 2 * LENGTH  # factors, of both owners


def test_linear_tied_to_linear_and_to_a_transpose() -> None:
    model = Model(lambda m, x: m.b(m.a(x).tanh()) + m.c(x), a=linear(), b=linear(), c=linear())
    model.b.weight = model.c.weight = model.a.weight
    bound = check(model, vector_loss, vectors())
    assert bound.space.names == ("a.weight", "a.bias", "b.bias", "c.bias")
    assert bound.space["a.weight"].kind == "outer"


@pytest.mark.parametrize("functional_child", [True, False])
def test_a_weight_tied_inside_of_a_module_without_a_rule(functional_child: bool) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = linear()
            self.weight = self.inner.weight

        def forward(self, x: Tensor) -> Tensor:
            if functional_child:  # both places are in the hands of this module
                h = functional.linear(x, self.inner.weight, self.inner.bias)
            else:  # the inner module answers for its own
                h = self.inner(x)
            return (h.tanh() @ self.weight).tanh() * self.weight.sum()

    check(Model(lambda m, x: m.outer(m.a(x)), a=linear(), outer=Outer()), vector_loss, vectors())


def test_a_weight_tied_across_kinds_is_dense() -> None:
    class Scale(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.sin()

    first = linear(WIDTH, WIDTH)
    norms = Model(lambda m, x: m.b(m.a(x)), a=nn.LayerNorm(WIDTH), b=nn.RMSNorm(WIDTH))
    norms.b.weight = norms.a.weight
    model = Model(lambda m, x: m.norms(m.b(m.a(x))), a=first, b=Scale(first.weight), norms=norms)
    bound = check(model, vector_loss, vectors())
    assert bound.space["a.weight"].kind == "dense"
    assert bound.space["a.weight"].shape == (WIDTH, WIDTH)


# --- selection ----------------------------------------------------------------------------------
def test_frozen_and_selected_parameters() -> None:
    def make() -> Model:
        parts = {"a": linear(), "norm": nn.LayerNorm(WIDTH), "b": linear(), "c": linear()}
        return Model(lambda m, x: m.c(m.b(m.norm(m.a(x))).relu()), **parts)

    model = make()
    model.a.requires_grad_(False)
    model.b.bias.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    bound = check(model, vector_loss, vectors())
    assert bound.space.names == ("norm.bias", "b.weight", "c")
    assert not model.a.weight.requires_grad
    assert model.c.weight.requires_grad

    assert check(make(), vector_loss, vectors(), "*.bias").space.parameter_names == (
        "a.bias", "norm.bias", "b.bias", "c.bias",
    )  # fmt: skip
    bound = check(make(), vector_loss, vectors(), ["b*", "!b.bias"])
    assert bound.space.names == ("b.weight",)


def test_unused_and_unreached_parameters_are_zero() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.dropped(x)  # called, but the loss does not depend on it
        with torch.no_grad():
            teacher = m.teacher(x)
        return m.a(x) * teacher

    parts = {"a": linear(), "unused": linear(), "dropped": linear(), "teacher": linear()}
    parts["words"] = nn.Embedding(3, 2)

    def call_all(m: Any, x: Tensor) -> Tensor:
        m.unused(x).detach()
        m.words(torch.zeros(len(x), 2, dtype=torch.long))
        return run(m, x)

    bound = check(Model(call_all, **parts), vector_loss, vectors())
    found = gradient_of(bound, vectors())
    for name in ("unused.weight", "dropped.bias", "teacher.weight", "words.weight"):
        assert not found[name].any()


def test_a_loss_that_reaches_nothing() -> None:
    model = Model(lambda m, x: m.a(x).detach() + x, a=linear()).double()
    bound, expected = bind(model, vector_loss, vectors(3))
    assert not any(g.any() for g in expected.values())
    assert not any(g.any() for g in gradient_of(bound, vectors(3)).values())


# --- attention and language models --------------------------------------------------------------
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_multihead_attention(first: bool, weights: bool, device: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = x if first else x.transpose(0, 1)
        out, _ = m.attention(h, h, h, need_weights=weights)
        other, _ = m.other(h, out, out.cos(), need_weights=weights)
        return other if first else other.transpose(0, 1)

    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=first, add_bias_kv=True)
    other = nn.MultiheadAttention(WIDTH, 3, batch_first=first)
    check(
        Model(run, attention=attention, other=other),
        vector_loss,
        vectors(5, 4, WIDTH),
        device=device,
    )


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_transformer_encoder(first: bool, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 8, batch_first=first, norm_first=norm_first, dropout=0.5
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def run(m: Any, x: Tensor) -> Tensor:
        return m.encoder(x) if first else m.encoder(x.transpose(0, 1)).transpose(0, 1)

    bound = check(Model(run, encoder=encoder), vector_loss, vectors(5, 4, WIDTH))
    outer = {block.name for block in bound.space if block.kind == "outer"}
    assert outer == {f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}


class GPT(nn.Module):
    """The layout of nanoGPT: positions of arange(T), pre-norm, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH + 1, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, bias=False) for _ in range(3))
        self.attend, self.project = linear(WIDTH, 3 * WIDTH), linear()
        self.up, self.down = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)
        self.head = linear(WIDTH, WORDS, bias=False)
        self.wte.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        q, k, v = (
            part.unflatten(2, (2, -1)).transpose(1, 2)
            for part in self.attend(self.norms[0](h)).split(WIDTH, dim=2)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.project(mixed.transpose(1, 2).flatten(2))
        h = h + self.down(functional.gelu(self.up(self.norms[1](h))))
        return self.head(self.norms[2](h))


@pytest.mark.parametrize("device", DEVICES)
def test_nano_gpt(device: str) -> None:
    bound = check(GPT(), token_loss, tokens(), device=device)
    assert all(b.kind == "outer" for b in bound.space if "norms" not in b.name)
    assert bound.space.names[:2] == ("wte.weight", "wpe.weight")


# --- modules without a rule ---------------------------------------------------------------------
def test_fallback_is_said_once(caplog: Any) -> None:
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.inner = nn.Parameter(torch.randn(())), linear()
            self.list = nn.ParameterList([torch.randn(WIDTH), torch.randn(2, WIDTH)])

        def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> dict[str, Any]:
            h = self.inner(x) * self.gain + self.list[0] * more["x"]
            return {"out": h, "other": [h.cos() @ self.list[1].T, None]}

    def run(m: Any, x: Tensor) -> Tensor:
        a = m.a(x, more={"x": x * 2})
        b = m.b(a["out"], more={"x": x})["other"][0]
        return a["out"] * b.sum(1, keepdim=True)

    with caplog.at_level(logging.INFO, logger="dattri"):
        bound = check(Model(run, a=Custom(), b=Custom()), vector_loss, vectors())
        check(Model(run, a=Custom(), b=Custom()), vector_loss, vectors())
    said = [record for record in caplog.records if "Custom" in record.getMessage()]
    assert len(said) == 1
    assert "no layer rule" in said[0].getMessage()
    assert bound.space["a.inner"].kind == "outer"  # that module only
    assert bound.space["a.gain"].shape == ()


def test_a_subclass_with_its_own_forward_does_not_use_the_rule() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2 + x

    class Named(nn.Linear):
        pass

    bound = check(
        Model(lambda m, x: m.b(m.a(x)), a=Doubled(WIDTH, WIDTH), b=Named(WIDTH, 2)),
        vector_loss,
        vectors(),
    )
    assert [(b.name, b.kind) for b in bound.space] == [
        ("a.weight", "dense"), ("a.bias", "dense"), ("b", "outer"),
    ]  # fmt: skip


def test_parametrized_weights() -> None:
    model = Model(lambda m, x: m.b(m.a(x)), a=linear(), b=linear())
    nn.utils.parametrizations.weight_norm(model.a)
    check(model, vector_loss, vectors())


def test_the_root_itself_is_the_layer() -> None:
    bound = check(linear(WIDTH, 3), vector_loss, vectors())
    assert bound.space.names == ("Linear",)


# --- losses and targets -------------------------------------------------------------------------
def test_targets_and_checkpoints() -> None:
    model = nn.Sequential(linear(), nn.Tanh(), linear(WIDTH, 3)).double()
    batch = (torch.randn(5, WIDTH).double(), torch.randint(3, (5,)))
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    task = dattri.Task(model, "cross-entropy", target="margin", checkpoints=other.state_dict())
    for source in (PerExample(), Functional()):
        bound = source.bind(task, task.checkpoints[0], dattri.take(batch, slice(0, 3)))
        train = loop_gradients(other, dattri.cross_entropy, batch)
        assert worst_difference(bound, train, batch, "train") <= TOLERANCE
        test = loop_gradients(other, true_margin, batch, sign=-1.0)
        assert worst_difference(bound, test, batch, "test") <= TOLERANCE


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_of_parameters(reduction: str) -> None:
    model = nn.Sequential(linear(), nn.Tanh(), linear(WIDTH, 3)).double()
    batch = (torch.randn(5, WIDTH).double(), torch.randint(3, (5,)))

    def loss(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        out = torch.func.functional_call(model, parameters, (batch[0],))
        return functional.cross_entropy(out, batch[1], reduction=reduction)

    task = dattri.Task(model, dattri.functional(loss))
    expected = loop_gradients(model, dattri.cross_entropy, batch)
    for source in (PerExample(), Functional()):
        bound = source.bind(task, task.checkpoints[0], dattri.take(batch, slice(0, 3)))
        assert worst_difference(bound, expected, batch) <= TOLERANCE


def test_batches_as_dictionaries() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(WORDS, WIDTH), linear(WIDTH, 3)

        def forward(self, tokens: Tensor, mask: Tensor) -> Any:
            return {"logits": self.head((self.words(tokens) * mask[..., None]).sum(1))}

    batch = {
        "tokens": torch.randint(WORDS, (5, LENGTH)),
        "mask": torch.rand(5, LENGTH).double(),
        "labels": torch.randint(3, (5,)),
    }
    check(Two(), dattri.cross_entropy, batch)
    bound, expected = bind(Two().double(), dattri.cross_entropy, batch, source=Functional())
    del expected
    model = bound.evaluator.task.model
    assert (
        worst_difference(bound, loop_gradients(model, dattri.cross_entropy, batch), batch)
        <= TOLERANCE
    )


# --- precision ----------------------------------------------------------------------------------
@pytest.mark.parametrize("source", [PerExample(), Functional()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, source: Any) -> None:
    parts = {"words": nn.Embedding(WORDS, WIDTH), "a": linear(), "norm": nn.LayerNorm(WIDTH)}
    model = Model(lambda m, x: m.norm(m.a(m.words(x)).tanh()), **parts).to(dtype)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return (out.flatten(1) * weights_like(out)).sum(1)

    batch = (torch.randint(WORDS, (4, LENGTH)),)
    bound, _ = bind(model, loss, batch, source=source)
    expected = loop_gradients(copy.deepcopy(model).double(), loss, batch)
    loose = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.15}[dtype]
    scale = max(g.abs().max().item() for g in expected.values())
    assert worst_difference(bound, expected, batch) <= loose * scale
    rows, _ = stream_rows(bound, batch)
    for block in rows.blocks.values():
        held = block.outputs if hasattr(block, "outputs") else block.values
        assert held.dtype == dtype
