"""What the graph may do: recompute activations, write in place, put examples on any axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dattri_parts.sources.per_example import PerExample
from oracles.devices import DEVICES
from oracles.loops import stream_rows
from oracles.models import (
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
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dattri_core as dattri
from dattri_core.testing import PeakMemory


# --- activation checkpoints ---------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = linear(WIDTH, 2 * WIDTH), linear(2 * WIDTH, WIDTH)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("patterns", ["*", "blocks.1.*", "!words*"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints(reentrant: bool, patterns: str, device: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.words(x)
        for block in m.blocks:
            h = checkpoint(block, h, use_reentrant=reentrant)
        h = checkpoint(m.blocks[0], h, use_reentrant=reentrant)  # one of them again
        return m.head(h)

    blocks = nn.ModuleList(Block() for _ in range(3))
    parts = {"words": nn.Embedding(WORDS, WIDTH), "blocks": blocks, "head": linear(WIDTH, WORDS)}
    bound = check(Model(run, **parts), token_loss, tokens(), patterns, device)
    # Blocks still come in the order of the backward pass, not all at its end.

    def straight(m: Any, x: Tensor) -> Tensor:
        h = m.words(x)
        for at in (0, 1, 2, 0):
            h = m.blocks[at](h)
        return m.head(h)

    plain = check(Model(straight, **parts), token_loss, tokens(), patterns, device)
    batch = dattri.map_tensors(lambda t: t.to(device), tokens())
    assert stream_rows(bound, batch)[1] == stream_rows(plain, batch)[1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_calls_with_examples_on_two_axes(reentrant: bool) -> None:
    def part(m: Any, h: Tensor) -> Tensor:
        return m.a(h.transpose(0, 1)).transpose(0, 1) + m.a(h)

    def run(m: Any, x: Tensor) -> Tensor:
        return checkpoint(part, m, m.first(x), use_reentrant=reentrant)

    model, batch = Model(run, a=linear(), first=linear()), vectors(5, 5, WIDTH)
    if not reentrant:
        check(model, vector_loss, batch)
        return
    bound, _ = bind(model.double(), vector_loss, batch)
    with pytest.raises(dattri.InputError, match="use_reentrant=False"):
        stream_rows(bound, batch)  # as many examples as positions


def test_a_checkpoint_keeps_no_inputs() -> None:
    """Inputs inside a checkpoint are recomputed, not held from the forward pass on."""
    alive: list[int] = []

    def run(m: Any, x: Tensor) -> Tensor:
        h = x
        for block in m.blocks:
            h = checkpoint(block, h, use_reentrant=False)
        alive.append(peak.live)
        return h

    def plain(m: Any, x: Tensor) -> Tensor:
        h = x
        for block in m.blocks:
            h = block(h)
        alive.append(peak.live)
        return h

    batch, peak = vectors(200), PeakMemory()
    for forward in (run, plain):
        model = Model(forward, blocks=nn.ModuleList(Block() for _ in range(6))).double()
        task = dattri.Task(model, loss=vector_loss)
        bound = PerExample().bind(task, task.checkpoints[0], dattri.take(batch, slice(0, 3)))
        peak = PeakMemory()
        with peak:
            bound.stream(batch, "train", lambda name, block: None)
    held, everything = alive[-1 - len(alive) // 2], alive[-1]
    one = 200 * WIDTH * 8
    # A checkpointed block keeps its output; a plain one also the normalised input of the first
    # linear layer, that of the second, twice as wide, and their sum.
    assert held <= 2 * 6 * one
    assert everything >= 4 * 6 * one


# --- writes in place ----------------------------------------------------------------------------
def test_relu_and_residual_in_place() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.act(m.a(x))
        h = m.act(m.norm(m.b(h)))
        out = m.c(h)
        out += x
        out.mul_(2)
        return m.d(out.relu_())

    parts = {name: linear() for name in "abcd"}
    model = Model(run, act=nn.ReLU(inplace=True), norm=nn.BatchNorm1d(WIDTH), **parts)
    check(model, vector_loss, vectors())


class Shift(nn.Module):
    """Plain autograd does not keep the input of an addition, so that it may be written into."""

    def __init__(self, power: int = 1) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.randn(WIDTH))
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by**self.power


def test_an_input_that_is_written_into_later() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = x * 1
        out = m.shift(h)
        bias = m.bias(h)
        h.add_(out)
        return h * bias

    parts = {"shift": Shift(2), "bias": linear()}
    parts["bias"].weight.requires_grad_(False)
    bound = check(Model(run, **parts), vector_loss, vectors())
    assert {type(module) for module in bound.habits.copied} == {Shift, nn.Linear}


def test_a_write_that_the_sample_did_not_show_is_an_error() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = x * 1
        out = m.shift(h)
        if len(x) > 4:
            h.mul_(2)
        return out

    model = Model(run, shift=Shift()).double()
    bound, _ = bind(model, vector_loss, vectors(3))
    with pytest.raises(dattri.InputError, match="Shift at 'shift' is changed in place after"):
        stream_rows(bound, vectors(5))


def test_a_write_into_an_output_that_the_sample_did_not_show_is_an_error() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.a(m.first(x))  # of three axes: a view, whose hook a write in place takes off
        return h.tanh_() if len(x) > 4 else h.tanh()

    model = Model(run, a=linear(), first=linear()).double()
    bound, _ = bind(model, vector_loss, vectors(3, 4, WIDTH))
    with pytest.raises(dattri.InputError, match="1 calls of Linear at 'a' gave no gradient"):
        stream_rows(bound, vectors(5, 4, WIDTH))


def test_a_model_that_takes_gradients_itself() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(m.energy(point).cos().sum(), point)
        return m.out(x + slope)

    parts = {"energy": linear(), "out": linear()}
    bound = check(Model(run, **parts), vector_loss, vectors())
    rows, _ = stream_rows(bound, vectors())
    assert not rows.blocks["energy"].flat().any()


def test_a_module_that_writes_into_its_input() -> None:
    class Multiply(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.randn(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(self.by).sin_()

    check(Model(lambda m, x: m.b(m.a(x)), a=linear(), b=Multiply()), vector_loss, vectors())


# --- which axis counts examples -----------------------------------------------------------------
def test_flattened_and_sequence_first_axes() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        count, length, width = x.shape
        major = m.a(x.reshape(count * length, width)).reshape(x.shape)
        minor = m.b(x.transpose(0, 1).reshape(length * count, width))
        minor = minor.reshape(length, count, width).transpose(0, 1)
        first = m.c(x.transpose(0, 1)).transpose(0, 1)
        scaled = m.scale(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (length, count))
        return major * minor + first * scaled.transpose(0, 1)

    class Scale(Shift):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.by

    parts = {name: linear() for name in "abc"}
    check(Model(run, scale=Scale(), **parts), vector_loss, vectors(5, 4, WIDTH))


@pytest.mark.parametrize("length", [2, 3, 4])  # of which two are also batch sizes at bind
@pytest.mark.parametrize("shape", ["T", "1T", "T1", "deep", "vector", "scalar"])
def test_outputs_that_all_examples_share(shape: str, length: int) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        place = torch.arange(length)
        if shape == "T":  # as nanoGPT adds positions
            return m.out(x + m.place(place))
        if shape == "1T":
            return m.out(x + m.place(place[None]))
        if shape == "T1":
            return m.out(x.transpose(0, 1) + m.place(place[:, None])).transpose(0, 1)
        if shape == "deep":  # what comes after is then one for each example too
            return m.out(x * m.norm(m.more(m.place(place)).tanh()))
        if shape == "vector":
            return m.out(x * m.more(m.place(place[0])))
        return m.out(x * m.one(m.place(place[0]))[0])

    parts = {"place": nn.Embedding(4, WIDTH), "out": linear()}
    if shape in ("deep", "vector"):
        parts["more"] = linear()
    if shape == "deep":
        parts["norm"] = nn.LayerNorm(WIDTH)
    if shape == "scalar":
        parts["one"] = linear(WIDTH, 1)
    bound = check(Model(run, **parts), vector_loss, vectors(5, length, WIDTH))
    if shape == "scalar":  # picked from, not broadcast: the module around it answers
        assert {b.name for b in bound.space if b.kind == "outer"} == {"out"}
    else:
        assert all(b.kind == "outer" for b in bound.space if b.name != "norm")


def test_a_shared_output_that_does_not_broadcast_falls_to_the_module_around_it() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classes = nn.Embedding(WORDS, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.classes(torch.arange(WORDS)).T

    bound = check(
        Model(lambda m, x: m.head(m.a(x)), a=linear(), head=Head()), vector_loss, vectors()
    )
    assert [block.kind for block in bound.space] == ["outer", "dense"]


class Offset(nn.Module):
    """As the first layer of T5: beside its answer, numbers of pairs of places for later layers."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.out = nn.Embedding(5, 2), linear()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        places = torch.arange(x.shape[1])
        near = (places[:, None] - places[None]).clamp(-2, 2) + 2
        bias = self.pairs(near).permute(2, 0, 1)[None]  # [1, 2, T, T]: of no example
        bias = bias if mask is None else bias - mask
        return self.out(bias.mean(1).softmax(-1) @ x), bias


@pytest.mark.parametrize("use", ["added", "unused", "constant", "picked", "summed"])
def test_one_of_several_outputs_that_all_examples_share(use: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h, bias = m.first(x)
        if use == "added":  # to numbers of each example
            scores = torch.stack([h @ h.mT, h @ x.mT], 1) + bias
            return m.last(scores.softmax(-1).sum(1) @ x)
        if use == "picked":  # repeating it would leave the loss as it is, and not the gradients
            h = torch.einsum("btw,ts->bsw", h, bias[0, 0])
        if use in ("summed", "constant"):  # repeating it would change the loss
            bias = bias.detach() if use == "constant" else bias
            h = torch.einsum("btw,ahts->bsw", h, bias)
        return m.last(h.tanh())

    parts = {"first": Offset(), "last": linear()}
    bound = check(Model(run, **parts), vector_loss, vectors(5, 3, WIDTH))
    kinds = {block.name: block.kind for block in bound.space}
    assert kinds["last"] == "outer"
    assert kinds["first.pairs.weight"] == "dense"
    answers = {site.path for site in bound.plan.sites}
    assert answers == {"first.out", "last", "" if use in ("picked", "summed") else "first"}


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_packed_sequences(cell: Any, alike: bool) -> None:
    """Whose places of all examples lie one after another: as many of the first as of any."""

    def run(m: Any, x: Tensor) -> Tensor:
        lengths = torch.full((len(x),), 3) if alike else 1 + (x[:, 0, 0] > 0).long()
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        _, state = m.cell(packed)
        return m.out(state[0][-1] if isinstance(state, tuple) else state[-1])

    parts = {"cell": cell(WIDTH, WIDTH, batch_first=True), "out": linear()}
    bound = check(Model(run, **parts), vector_loss, vectors(5, 4, WIDTH))
    assert bound.space["out"].kind == "outer"


def test_a_cell_without_a_state_is_run_by_itself() -> None:
    """The state that it makes has the size of the batch, and is written into."""

    def run(m: Any, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
        return m.out(state[0])

    parts = {"cell": nn.LSTMCell(WIDTH, WIDTH), "out": linear()}
    check(Model(run, **parts), vector_loss, vectors(5, 3, WIDTH))


def test_bags_that_begin_at_offsets() -> None:
    """A bag of one example by itself does not begin where it begins in the batch."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(m.bags(x.flatten(), torch.arange(0, x.numel(), x.shape[1])).tanh())

    x, _ = tokens()
    parts = {"bags": nn.EmbeddingBag(WORDS, WIDTH), "out": linear()}
    bound = check(Model(run, **parts), vector_loss, (x, vectors()[1]))
    assert {site.path for site in bound.plan.sites} == {"", "out"}


def test_a_module_called_once_for_each_example_falls_to_the_module_around_it() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return torch.stack([m.a(row) for row in x])

    check(Model(run, a=linear()), vector_loss, vectors())


def test_calls_that_vary_from_batch_to_batch() -> None:
    """As many calls as the longest example of a batch has steps."""

    def run(m: Any, x: Tensor) -> Tensor:
        h, steps = torch.zeros_like(x), x[:, 0].abs().round()
        for step in range(int(steps.max())):
            h = torch.where((steps > step)[:, None], m.cell(x, h), h)
        return h + m.a(x)

    x, y = vectors(5)
    x[:, 0] = torch.tensor([1.0, 2, 1, 5, 3])
    check(Model(run, cell=nn.GRUCell(WIDTH, WIDTH), a=linear()), vector_loss, (x, y))


def test_calls_that_the_sample_did_not_show_are_learned_from_their_batch() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.a(x) if len(x) <= 4 else m.a(x[:, None, None]).flatten(1)

    check(Model(run, a=linear()), vector_loss, vectors(5))


@pytest.mark.parametrize("padded", [0, 4])  # in the sample or only after it
def test_a_mask_that_is_made_where_an_example_needs_it(padded: int) -> None:
    """And with it whether the bias of all pairs of places has an axis of examples."""

    def run(m: Any, x: Tensor) -> Tensor:
        short = x[:, :, 0] > 9
        h, bias = m.first(x, short[:, None, None].double() if short.any() else None)
        scores = torch.stack([h @ h.mT, h @ x.mT], 1) + bias
        return m.last(scores.softmax(-1).sum(1) @ x)

    x, y = vectors(5, 3, WIDTH)
    x[padded, -1, 0] = 10.0
    bound = check(Model(run, first=Offset(), last=linear()), vector_loss, (x, y))
    assert bound.first_rows() is None
    calls = bound.habits.layouts["train"][bound.evaluator.task.model.first]
    assert {call.is_spread for call in calls} == {True, False}


def test_calls_are_not_learned_where_memory_runs_out_before_their_rows_are_compared() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        out: Tensor = m.a(x) if len(x) <= 4 else m.a(x[:, None, None]).flatten(1)
        if len(x) > 4 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    bound, _ = bind(Model(run, a=linear()).double(), vector_loss, vectors(3))
    before = bound.habits.layouts["train"]
    with pytest.raises(torch.OutOfMemoryError):
        stream_rows(bound, vectors(5))
    assert bound.habits.layouts["train"] == before


def test_learned_calls_whose_rows_are_wrong_are_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
            return x * self.gain if more is None else x.flip(0) * more * self.gain

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)  # whose examples change places inside, and change back after it
        return m.mixed(h) if len(x) <= 4 else m.mixed(h, h.flip(0)).flip(0)

    model = Model(run, a=linear(), mixed=Mixed()).double()
    bound, _ = bind(model, vector_loss, vectors(3))
    with pytest.raises(
        dattri.InputError, match=r"Mixed at 'mixed' is called with shapes .* unlike"
    ):
        stream_rows(bound, vectors(5))
    stream_rows(bound, vectors(2))


def test_a_call_unlike_those_of_the_sample_is_an_error() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.a(x) if len(x) <= 4 else torch.stack([m.a(row) for row in x])

    model = Model(run, a=linear()).double()
    bound, _ = bind(model, vector_loss, vectors(3))
    with pytest.raises(dattri.InputError, match=r"Linear at 'a' is called with shapes .* unlike"):
        stream_rows(bound, vectors(5))
