"""Every layer kind x options: rows equal a loop of single-example backward passes in float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from dattri_parts.sources.functional import Functional
from dattri_parts.sources.layers.convolution import ConvolutionRule
from dattri_parts.sources.per_example import PerExample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles.devices import DEVICES
from oracles.loops import loop_gradients, stream_rows, worst_difference
from oracles.models import Pulled
from torch import Tensor, nn

import dattri_core as dattri
from dattri_core.blocks import OuterBlock
from dattri_core.laws.pretended import NAME

TOLERANCE = 1e-10
matrix = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Conv1D(nn.Module):
    """What ``transformers.pytorch_utils.Conv1D`` is: y = x W + b with weight [I, O]."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(shape)


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


def _first(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return out[0] if isinstance(out, tuple) else out


def _smooth(out: Tensor, batch: Any) -> Tensor:
    """Another weight for every output entry, so that no transpose goes unseen."""
    size = out[0].numel()
    weights = torch.linspace(0.3, 1.7, size, dtype=out.dtype, device=out.device)
    return ((out.flatten(1) * batch[1][:, None]).sin() * weights).sum(1)


smooth_loss = dattri.Loss(_first, _smooth, "smooth")


def check(
    layer: nn.Module, x: Tensor, device: str = "cpu", kinds: tuple[str, ...] = (), frozen: str = ""
) -> dattri.Space:
    """Compare both sources with the loop, on all examples and on a batch of one."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(x.numel())
    model = nn.Sequential(layer).double().to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
        parameter.data *= 0.5
    for buffer in model.buffers():  # running statistics that are not 0 and 1
        if buffer.is_floating_point():
            buffer.data = torch.rand_like(buffer) + 0.5
    if frozen:
        model.get_parameter(f"0.{frozen}").requires_grad_(False)
    batch = (x.to(device), (torch.rand(len(x), dtype=torch.float64) + 0.5).to(device))
    expected = loop_gradients(model, smooth_loss, batch)
    task = dattri.Task(model, loss=smooth_loss)
    bound = PerExample().bind(task, task.checkpoints[0], dattri.take(batch, slice(0, 3)))
    assert worst_difference(bound, expected, batch) <= TOLERANCE
    assert worst_difference(Pulled(bound, smooth_loss), expected, batch) <= TOLERANCE
    one = {name: values[1:2] for name, values in expected.items()}
    assert worst_difference(bound, one, dattri.take(batch, slice(1, 2))) <= TOLERANCE
    if kinds:
        assert tuple(block.kind for block in bound.space) == kinds
        rows, _ = stream_rows(bound, batch)
        for block in bound.space:  # an outer or grouped block comes as factors
            assert (rows.blocks[block.name].positions is None) == (block.kind == "dense")
    return bound.space


def frozen_of(draw: Any, bias: bool) -> str:
    return draw(st.sampled_from(["", "weight", "bias"] if bias else [""]))


def kinds_of(kind: str, frozen: str) -> tuple[str, ...]:
    return ("dense",) if frozen == "weight" else (kind,)


@pytest.mark.parametrize("device", DEVICES)
@matrix
@given(data=st.data())
def test_linear(device: str, data: st.DataObject) -> None:
    inputs, outputs = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    bias = data.draw(st.booleans())
    frozen = frozen_of(data.draw, bias)
    between = data.draw(st.lists(st.integers(1, 4), max_size=2))
    x = torch.randn(4, *between, inputs, dtype=torch.float64)
    layer = nn.Linear(inputs, outputs, bias=bias)
    space = check(layer, x, device, kinds_of("outer", frozen), frozen)
    columns = (inputs if frozen != "weight" else 0) + (bias and frozen != "bias")
    assert space.blocks[0].matrix_shape == (outputs, columns)


@pytest.mark.parametrize("device", DEVICES)
@matrix
@given(data=st.data())
def test_hugging_face_conv1d(device: str, data: st.DataObject) -> None:
    inputs, outputs = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    frozen = frozen_of(data.draw, True)
    x = torch.randn(4, data.draw(st.integers(1, 3)), inputs, dtype=torch.float64)
    check(Conv1D(outputs, inputs), x, device, kinds_of("outer", frozen), frozen)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axes", [1, 2, 3])
@matrix
@given(data=st.data())
def test_convolutions(device: str, axes: int, data: st.DataObject) -> None:
    def each(strategy: st.SearchStrategy[int]) -> tuple[int, ...]:
        return data.draw(st.tuples(*[strategy] * axes))

    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    inputs = groups * data.draw(st.integers(1, 2))
    outputs = groups * data.draw(st.integers(1, 2))
    kernel, dilation = each(st.integers(1, 3)), each(st.integers(1, 2))
    padding: Any = data.draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1,) * axes if padding == "same" else each(st.integers(1, 3))
    if padding == "numbers":
        padding = each(st.integers(0, 2))
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    bias = data.draw(st.booleans())
    frozen = frozen_of(data.draw, bias)
    # Wide enough for the reach of the kernel, and for a reflection of the padding.
    size = [
        d * (k - 1) + 2 + data.draw(st.integers(0, 2))
        for k, d in zip(kernel, dilation, strict=True)
    ]
    size = [max(s, 3) for s in size]
    layer = getattr(nn, f"Conv{axes}d")(
        inputs, outputs, kernel, stride, padding, dilation, groups, bias, mode
    )
    x = torch.randn(3, inputs, *size, dtype=torch.float64)
    kind = kinds_of("outer" if groups == 1 else "grouped", frozen)
    space = check(layer, x, device, kind, frozen)
    columns = (inputs // groups * math.prod(kernel) if frozen != "weight" else 0) + (
        bias and frozen != "bias"
    )
    assert space.blocks[0].matrix_shape == (outputs, columns)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_same_padding_of_an_even_kernel(axes: int, groups: int, mode: str) -> None:
    """The odd one of the padding goes to the right."""
    kernel, dilation = (2, 4, 3)[:axes], (1, 1, 2)[:axes]
    layer = getattr(nn, f"Conv{axes}d")(
        2, 4, kernel, padding="same", dilation=dilation, groups=groups, padding_mode=mode
    )
    check(layer, torch.randn(3, 2, *[5] * axes, dtype=torch.float64))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("stride", "dilation", "padding"), [(1, 1, 1), (2, 1, 0), (1, 2, 2)])
def test_patches_are_those_of_unfold_and_read_as_one_matrix(
    bias: bool, stride: int, dilation: int, padding: int
) -> None:
    """The inputs of all positions of all examples are one matrix, without a copy of them."""
    layer = nn.Conv2d(3, 5, (3, 2), stride, padding, dilation, bias=bias).double()
    given = torch.randn(4, 3, 9, 8, generator=torch.Generator().manual_seed(0)).double()
    outputs = layer(given)
    trained = {name: name for name, _ in layer.named_parameters()}
    block = ConvolutionRule().rows(layer, trained, given, torch.ones_like(outputs))
    assert isinstance(block, OuterBlock)
    inputs = block.own_inputs
    assert isinstance(inputs, Tensor)
    expected = nn.functional.unfold(given, (3, 2), dilation, padding, stride).mT
    torch.testing.assert_close(inputs[..., : expected.shape[2]], expected, rtol=0, atol=0)
    assert inputs.shape[2] == expected.shape[2] + bias
    assert bool((inputs[..., expected.shape[2] :] == 1).all())
    assert inputs.flatten(0, 1).data_ptr() == inputs.data_ptr()
    assert inputs.stride(1) == 1  # as positions were copied, with the bias too


@pytest.mark.parametrize("device", DEVICES)
@matrix
@given(data=st.data())
def test_embedding(device: str, data: st.DataObject) -> None:
    words, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    padding = data.draw(st.sampled_from([None, 0, -1]))
    frequency = data.draw(st.booleans())
    # torch has no sparse gradient that is scaled by frequency, and what pretends no sparse tensors.
    sparse = data.draw(st.booleans()) and not frequency and device != NAME
    shape = data.draw(st.lists(st.integers(1, 4), max_size=2))
    layer = nn.Embedding(
        words, width, padding_idx=padding, scale_grad_by_freq=frequency, sparse=sparse
    )
    x = torch.randint(words, (4, *shape))
    space = check(layer, x, device, ("dense",) if frequency else ("outer",))
    if not frequency:
        assert space.blocks[0].shape == (width, words)


@pytest.mark.parametrize("device", DEVICES)
@matrix
@given(data=st.data())
def test_layer_and_rms_norm(device: str, data: st.DataObject) -> None:
    shapes = st.lists(st.integers(1, 4), min_size=1, max_size=2)
    shape = data.draw(shapes.filter(lambda s: max(s) > 1))  # one number less its mean is rounding
    between = data.draw(st.lists(st.integers(1, 3), max_size=2))
    eps = data.draw(st.sampled_from([1e-5, 1e-2]))
    layer: nn.Module
    if data.draw(st.booleans()):
        bias = data.draw(st.booleans())
        frozen = frozen_of(data.draw, bias)
        layer = nn.LayerNorm(shape, eps=eps, bias=bias)
    else:
        frozen = ""
        layer = nn.RMSNorm(shape, eps=data.draw(st.sampled_from([None, eps])))
    x = torch.randn(4, *between, *shape, dtype=torch.float64)
    check(layer, x, device, ("dense",), frozen)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_a_norm_of_one_feature_has_no_gradient_but_rounding(device: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 1, dtype=torch.float64, generator=generator)
    check(nn.LayerNorm([1], bias=False), x, device, ("dense",), "")


@pytest.mark.parametrize("device", DEVICES)
@matrix
@given(data=st.data())
def test_group_and_batch_norm(device: str, data: st.DataObject) -> None:
    axes = data.draw(st.integers(0, 3))
    frozen = frozen_of(data.draw, True)
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    layer: nn.Module
    if data.draw(st.booleans()):
        groups = data.draw(st.integers(1, 3))
        channels = groups * 2
        layer = nn.GroupNorm(groups, channels)
    else:
        channels = data.draw(st.integers(1, 4))
        layer = getattr(nn, f"BatchNorm{max(axes, 1)}d")(channels)
    x = torch.randn(4, channels, *sizes, dtype=torch.float64)
    check(layer, x, device, ("dense",), frozen)


class Pair(nn.Module):
    """Gives the one input of a test twice to a module of two inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.cos())


class Recurrent(nn.Module):
    """Keeps the outputs of a recurrent layer, which has several."""

    def __init__(self, inner: nn.Module, batch_first: bool) -> None:
        super().__init__()
        self.inner, self.batch_first = inner, batch_first

    def forward(self, x: Tensor) -> Tensor:
        out, last = self.inner(x if self.batch_first else x.transpose(0, 1))
        last = last[0] if isinstance(last, tuple) else last
        out = out if self.batch_first else out.transpose(0, 1)
        return out.flatten(1) + last.transpose(0, 1).flatten(1).sum(1, keepdim=True)


def fallbacks() -> list[Any]:
    image = (4, 4, 3, 3)
    cases: list[tuple[str, Any, tuple[int, ...]]] = [
        ("transposed-1d", lambda: nn.ConvTranspose1d(4, 2, 2, stride=2, groups=2), (4, 4, 3)),
        ("transposed-2d", lambda: nn.ConvTranspose2d(4, 2, 2, padding=1), image),
        ("bilinear", lambda: Pair(nn.Bilinear(3, 3, 2)), (4, 3)),
        ("prelu", lambda: nn.PReLU(4), image),
        ("instance-norm", lambda: nn.InstanceNorm2d(4, affine=True), image),
        (
            "instance-norm-running",
            lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            image,
        ),
        ("weight-norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (4, 5, 3)),
        ("gru-cell", lambda: nn.GRUCell(3, 2), (4, 3)),
    ]

    def recurrent(kind: str, first: bool) -> Recurrent:
        return Recurrent(getattr(nn, kind)(3, 2, 2, batch_first=first, bidirectional=True), first)

    cases += [
        (f"{kind}-{first}", partial(recurrent, kind, first), (4, 5, 3))
        for kind in ("RNN", "GRU", "LSTM")
        for first in (True, False)
    ]
    return [pytest.param(make, shape, id=name) for name, make, shape in cases]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("make", "shape"), fallbacks())
def test_modules_without_a_rule(device: str, make: Any, shape: tuple[int, ...]) -> None:
    fused = (nn.RNNBase, nn.RNNCellBase)
    if device == NAME and any(isinstance(module, fused) for module in make().modules()):
        pytest.skip("on a device torch takes a fused cell, which the CPU has not")
    torch.manual_seed(0)
    space = check(make(), torch.randn(shape, dtype=torch.float64), device)
    assert {block.kind for block in space} == {"dense"}


@pytest.mark.parametrize("device", DEVICES)
def test_embedding_bag(device: str) -> None:
    check(nn.EmbeddingBag(5, 3, mode="mean"), torch.randint(5, (4, 6)), device, ("dense",))


def test_max_norm_is_refused() -> None:
    model = nn.Embedding(5, 3, max_norm=10.0).double()
    batch = (torch.randint(5, (3, 2)), torch.rand(3).double())
    task = dattri.Task(model, loss=smooth_loss)
    with pytest.raises(dattri.InputError, match=r"max_norm=10.0, which rewrites its weights"):
        PerExample().bind(task, task.checkpoints[0], batch)


@matrix
@given(data=st.data())
def test_functional_equals_the_loop(data: st.DataObject) -> None:
    layer, x = data.draw(
        st.sampled_from(
            [
                (nn.Linear(3, 2), torch.randn(5, 3)),
                (nn.Conv2d(2, 4, 2, groups=2), torch.randn(5, 2, 3, 3)),
                (nn.LayerNorm(3), torch.randn(5, 2, 3)),
                (nn.BatchNorm1d(3), torch.randn(5, 3)),
                (nn.Embedding(4, 2), torch.randint(4, (5, 3))),
                (nn.PReLU(3), torch.randn(5, 3)),
            ]
        )
    )
    chunk = data.draw(st.sampled_from([None, 1, 2, 7]))
    model = nn.Sequential(layer).double()
    x = x.double() if x.is_floating_point() else x
    batch = (x, torch.rand(len(x)).double() + 0.5)
    task = dattri.Task(model, loss=smooth_loss)
    bound = Functional(chunk=chunk).bind(task, task.checkpoints[0], dattri.take(batch, slice(0, 3)))
    expected = loop_gradients(model, smooth_loss, batch)
    assert worst_difference(bound, expected, batch) <= TOLERANCE
    assert worst_difference(Pulled(bound, smooth_loss), expected, batch) <= TOLERANCE
