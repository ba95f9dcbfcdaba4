"""What hooks must not do: stay, hide the user's, touch the model, hold rows, answer wrongly."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from attrs import evolve
from dattri_parts.sources import per_example, rules
from dattri_parts.sources.functional import Functional
from dattri_parts.sources.per_example import PerExample
from oracles.loops import loop_gradients, stream_rows, worst_difference
from oracles.toy_rules import Twice
from torch import Tensor, nn

import dattri_core as dattri
from dattri_core.registry import Registry, using
from dattri_core.testing import PeakMemory

WIDTH = 4


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (model(x) * y[:, None]).sin().flatten(1).sum(1)


def batch_of(count: int = 5, width: int = WIDTH) -> Any:
    return torch.randn(count, width).double(), torch.rand(count).double() + 0.5


def mlp(depth: int = 3, width: int = WIDTH) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers).double()


def bind(model: nn.Module, batch: Any, source: Any = None, **options: Any) -> Any:
    task = dattri.Task(model, loss=options.pop("loss", loss), **options)
    source = source or PerExample()
    return source.bind(task, task.checkpoints[0], dattri.take(batch, slice(0, 3)))


def hooks_of(model: nn.Module) -> list[int]:
    return [
        len(hooks)
        for m in model.modules()
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
    ]


def state_of(model: nn.Module) -> list[Any]:
    return [
        (name, t.detach().clone(), t.requires_grad, id(t), t.grad)
        for name, t in (*model.named_parameters(), *model.named_buffers())
    ] + [module.training for module in model.modules()]


def same(left: list[Any], right: list[Any]) -> bool:
    return all(
        a == b
        if isinstance(a, bool)
        else torch.equal(a[1], b[1]) and (a[0], *a[2:]) == (b[0], *b[2:])
        for a, b in zip(left, right, strict=True)
    )


# --- the model is left alone --------------------------------------------------------------------
@pytest.mark.parametrize("source", [PerExample(), Functional()])
def test_the_model_is_untouched(source: Any) -> None:
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(), mlp()
    ).double()
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    for parameter in model[3].parameters():
        parameter.grad = torch.ones_like(parameter)
    before, hooks = state_of(model), hooks_of(model)
    batch = batch_of()
    batch[0].requires_grad_()
    bound = bind(model, batch, source)
    stream_rows(bound, batch)
    assert same(before, state_of(model))
    assert hooks == hooks_of(model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["sink", "forward", "criterion"])
def test_nothing_is_left_behind_by_an_exception(where: str, error: type[BaseException]) -> None:
    fail = False

    class Middle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if fail and where == "forward":
                raise error("stop")
            return x

    def own_loss(model: nn.Module, batch: Any) -> Tensor:
        values = loss(model, batch)
        if fail and where == "criterion":
            raise error("stop")
        return values

    model = nn.Sequential(mlp(), Middle(), mlp()).train()
    batch = batch_of()
    bound = bind(model, batch, loss=own_loss)
    expected = loop_gradients(model, own_loss, batch)
    before, hooks = state_of(model), hooks_of(model)
    fail = True

    def sink(name: str, block: Any) -> None:
        if where == "sink" and name == "0.4":
            raise error("stop")

    with pytest.raises(error, match="stop"):
        bound.stream(batch, "train", sink)
    assert same(before, state_of(model))
    assert hooks == hooks_of(model)
    fail = False
    assert worst_difference(bound, expected, batch) < 1e-10  # and it goes on working


def test_hooks_of_the_user_keep_working() -> None:
    model = mlp()
    seen: list[str] = []
    handles = [
        model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
        model[2].register_forward_hook(lambda m, args, out: seen.append("forward")),
        model[2].register_forward_hook(lambda m, args, out: out * 3),
        model[4].register_full_backward_hook(lambda m, i, o: seen.append("backward")),
        model[4].register_forward_hook(lambda m, args, out: out.cos()),
    ]
    batch = batch_of()
    bound = bind(model, batch)
    seen.clear()
    assert worst_difference(bound, loop_gradients(model, loss, batch), batch) < 1e-10
    assert seen.count("forward") >= 1
    assert seen.count("backward") >= 1
    assert len(model[2]._forward_hooks) == 2
    for handle in handles:
        handle.remove()


def test_hooks_of_the_user_on_a_module_without_a_rule() -> None:
    model, batch = (
        nn.Sequential(nn.Bilinear(WIDTH, WIDTH, WIDTH), nn.PReLU(WIDTH)).double(),
        batch_of(),
    )
    handles = [
        model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2, args[0].cos())),
        model[1].register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
        model[1].register_forward_hook(lambda m, args, out: (out * 3).sin()),
    ]
    expected = loop_gradients(model, loss, batch)
    assert worst_difference(bind(model, batch), expected, batch) < 1e-10
    for handle in handles:
        handle.remove()


def test_under_no_grad_and_inference_mode() -> None:
    model, batch = mlp(), batch_of()
    expected = loop_gradients(model, loss, batch)
    for source in (PerExample(), Functional()):
        with torch.no_grad():
            assert worst_difference(bind(model, batch, source), expected, batch) < 1e-10
        with torch.inference_mode():
            assert worst_difference(bind(model, batch, source), expected, batch) < 1e-10
            copied = dattri.map_tensors(torch.clone, batch)  # inference tensors
            assert worst_difference(bind(model, copied, source), expected, copied) < 1e-10


# --- streaming ----------------------------------------------------------------------------------
def test_blocks_come_in_backward_order_and_one_at_a_time() -> None:
    depth, width, count = 12, 40, 8
    model = mlp(depth, width)
    batch = batch_of(count, width)
    bound = bind(model, batch)
    order: list[str] = []
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def sink(name: str, block: Any) -> None:
        nonlocal most
        order.append(name)
        most = max(most, sum(ref() is not None for ref in alive))
        alive.extend([weakref.ref(block.outputs), weakref.ref(block.inputs)])

    gc.disable()  # a cycle of references would hold rows until it runs
    try:
        bound.stream(batch, "train", sink)
        assert order == [str(2 * at) for at in reversed(range(depth))]
        # Nothing of the blocks given before, but for one factor: autograd's own gradient, which is
        # still on its way down when the next block comes.
        assert most <= 1
        assert sum(ref() is not None for ref in alive) == 0
    finally:
        gc.enable()


def test_inputs_are_freed_as_the_backward_pass_goes() -> None:
    depth, width, count = 20, 8, 500
    model, batch = mlp(depth, width), batch_of(count, width)
    bound = bind(model, batch)
    live: list[int] = []
    gc.disable()
    try:
        with PeakMemory() as memory:
            bound.stream(batch, "train", lambda name, block: live.append(memory.live))
    finally:
        gc.enable()
    one = count * width * 8
    assert len(live) == depth
    assert live[0] >= depth * one  # all activations, when the last layer reports
    assert live[-1] <= 6 * one  # those of one layer, when the first does


def test_formed_rows_of_all_layers_are_never_alive_together() -> None:
    width, count = 64, 16
    peaks = []
    for depth in (2, 10):
        model = mlp(depth, width)
        batch = batch_of(count, width)
        bound = bind(model, batch)
        gc.collect()
        gc.disable()
        try:
            with PeakMemory() as memory:
                bound.stream(batch, "train", lambda name, block: block.dense())
        finally:
            gc.enable()
        peaks.append(memory.peak)
    one_layer = count * width * (width + 1) * 8
    activations = 8 * 4 * count * width * 8  # of eight more layers
    assert one_layer > activations / 8
    assert peaks[1] - peaks[0] <= activations
    assert peaks[0] >= one_layer


# --- wrong use is found -------------------------------------------------------------------------
class Outside(nn.Module):
    """A weight that is used outside of its module as well."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x).tanh())
        if self.way == "directly":
            h = h + nn.functional.linear(x, self.a.weight)
        return h @ self.a.weight if self.way == "as a head" else h


@pytest.mark.parametrize("way", ["directly", "as a head"])
def test_the_module_around_answers_for_a_weight_that_is_used_in_it_too(way: str) -> None:
    model, batch = nn.Sequential(Outside(way), nn.Linear(WIDTH, WIDTH)).double(), batch_of()
    bound = bind(model, batch)
    assert worst_difference(bound, loop_gradients(model, loss, batch), batch) < 1e-10
    assert {site.path for site in bound.plan.sites} == {"0", "0.b", "1"}


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_a_hook_makes_before_the_call(name: str) -> None:
    """As `torch.nn.utils.weight_norm` does: its parameters are not those that the module uses."""
    model, batch = mlp(2), batch_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0], name)
    bound = bind(model, batch)
    assert worst_difference(bound, gradients_in_place(model, batch), batch) < 1e-10


def gradients_in_place(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return the gradient of each example's loss, of a model that cannot be copied."""
    weights = dict(model.named_parameters())
    singles = (loss(model, dattri.take(batch, slice(b, b + 1))).sum() for b in range(5))
    rows = [torch.autograd.grad(value, list(weights.values())) for value in singles]
    return {
        name: torch.stack(grads)
        for name, grads in zip(weights, zip(*rows, strict=True), strict=True)
    }


def test_a_parameter_in_the_loss_itself_is_refused() -> None:
    def own_loss(model: nn.Module, batch: Any) -> Tensor:
        decay: Tensor = model.a.weight.square().sum()
        return loss(model, batch) + decay

    model, batch = Outside("not at all").double(), batch_of()
    with pytest.raises(dattri.InputError, match=r"rows of 'a.weight' \(by .*'functional'"):
        bind(model, batch, loss=own_loss)
    bound = bind(model, batch, Functional(), loss=own_loss)  # the cure that it names
    assert worst_difference(bound, loop_gradients(model, own_loss, batch), batch) < 1e-10
    bound = bind(model, batch, loss=own_loss, parameters="!a.weight")
    expected = loop_gradients(model, own_loss, batch)
    assert worst_difference(bound, expected, batch) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("unit", [1.0, 1e-8, 1e-13])
def test_wrong_rows_are_found_in_any_unit_of_the_loss(unit: float, dtype: torch.dtype) -> None:
    """A mean over a million pixels has gradients that are as small as rounding elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    batch = torch.randn(5, 4).to(dtype), torch.arange(5) % 3

    def plain(model: nn.Module, batch: Any) -> Tensor:
        return unit * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def decayed(model: nn.Module, batch: Any) -> Tensor:
        return plain(model, batch) + unit * model[0].weight.square().sum() / 2

    def bind(loss: Any) -> Any:
        task = dattri.Task(model, loss=loss)
        return PerExample().bind(task, task.checkpoints[0], batch)

    bind(plain)
    with pytest.raises(dattri.InputError, match=r"rows of '0\.weight'.*weight decay"):
        bind(decayed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sure", [20.0, 500.0, 5000.0])
def test_what_a_sure_model_rounds_is_not_wrong(sure: float, dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 32), nn.ReLU())
        model.append(nn.Linear(32, 5)).to(dtype)
        inputs = torch.randn(8, 20).to(dtype)
        with torch.no_grad():
            for value in model[-1].parameters():
                value.mul_(sure)
            labels = model(inputs).argmax(1)
        task = dattri.Task(model)
        PerExample().bind(task, task.checkpoints[0], (inputs, labels))


def test_a_model_that_is_never_called_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH).double())

    def own_loss(model: nn.Module, batch: Any) -> Tensor:
        return (batch[0] * model.weight).sum(1).sin()

    with pytest.raises(dattri.InputError, match="for 'weight': neither its module"):
        bind(Bare(), batch_of(), loss=own_loss)
    bound = bind(Bare(), batch_of(), Functional(), loss=own_loss)
    assert bound.space.names == ("weight",)


@pytest.mark.parametrize("source", [PerExample(), Functional()])
def test_a_gradient_that_is_not_finite_is_named(source: Any) -> None:
    def own_loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]).square() * batch[1][:, None]).sqrt().sum(1)  # 0 * inf where y = 0

    model, (x, y) = mlp(1), batch_of(6)
    y[4] = 0.0
    bound = bind(model, (x, y), source, loss=own_loss)
    where = "'0'" if isinstance(source, PerExample) else "'0.weight'"
    with pytest.raises(
        dattri.NumericsError, match=rf"'current weights': block {where}, examples \[4\]"
    ):
        bound.stream((x, y), "train", lambda name, block: None)
    bound.stream((x[:4], y[:4]), "train", lambda name, block: None)


def test_a_sum_that_overflows_is_no_error() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).float()
    nn.init.constant_(model[0].weight, 1e-38)
    x = torch.full((4, WIDTH), 3e38)

    def own_loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) * 1e-30).sum(1)

    bound = bind(model, (x,), loss=own_loss)
    rows, _ = stream_rows(bound, (x,))
    assert not rows.blocks["0"].inputs.sum().isfinite()
    assert rows.flat().isfinite().all()


# --- layer rules of others ----------------------------------------------------------------------
def test_a_third_party_adds_a_rule() -> None:
    model, batch = (
        nn.Sequential(Twice(WIDTH, WIDTH), nn.Tanh(), Twice(WIDTH, 2)).double(),
        batch_of(),
    )
    assert {b.kind for b in bind(model, batch).space} == {"dense"}
    own = Registry()
    own.merge(dattri.default_registry())
    own.part("layer_rule", "oracles.toy_rules.Twice", "oracles.toy_rules:TwiceRule")
    with using(own):
        bound = bind(model, batch)
        assert [(b.name, b.kind) for b in bound.space] == [("0", "outer"), ("2", "outer")]
        assert worst_difference(bound, loop_gradients(model, loss, batch), batch) < 1e-10


def test_a_wrong_rule_is_found_at_bind() -> None:
    own = Registry()
    own.merge(dattri.default_registry())
    own.part("layer_rule", "oracles.toy_rules.Twice", "oracles.toy_rules:WrongRule")
    model = nn.Sequential(Twice(WIDTH, WIDTH)).double()
    with using(own), pytest.raises(dattri.InputError, match=r"'0.weight' \(by 5.0e-01\)"):
        bind(model, batch_of())


def test_a_script_takes_no_hooks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model: Any = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double())
    batch = batch_of()
    with pytest.raises(dattri.InputError, match=r"the module '' is a script.*'functional'"):
        bind(model, batch)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    want = gradients_in_place(model, batch)
    with torch.no_grad():
        model[0].weight.zero_()
    bound = bind(model, batch, Functional(), checkpoints=state)
    assert worst_difference(bound, want, batch) < 1e-10


def test_every_registered_rule_is_made() -> None:
    registry = dattri.default_registry()
    names = registry.names("layer_rule")
    assert {"torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"} <= set(names)
    for name in names:
        rule = registry.make("layer_rule", name)
        assert isinstance(rule.leading, bool)


# --- values and protocols -----------------------------------------------------------------------
def test_parts_are_values() -> None:
    assert PerExample() == PerExample()
    assert evolve(Functional(), chunk=2) == Functional(chunk=2) != Functional()
    for source in (PerExample(), Functional()):
        assert isinstance(source, dattri.Source)
        assert source.provides == frozenset()
        bound = bind(mlp(), batch_of(), source)
        assert isinstance(bound, dattri.BoundSource)
        assert isinstance(bound.evaluator, dattri.Evaluator)
        assert dict(bound.stream(batch_of(), "train", lambda name, block: None)) == {}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("source", [PerExample(), Functional()])
def test_a_sample_of_few_examples(source: Any, count: int) -> None:
    model, batch = mlp(), batch_of()
    task = dattri.Task(model, loss=loss)
    bound = source.bind(task, task.checkpoints[0], dattri.take(batch, slice(0, count)))
    assert worst_difference(bound, loop_gradients(model, loss, batch), batch) < 1e-10


def test_rows_do_not_depend_on_the_batch() -> None:
    model, batch = mlp(), batch_of(9)
    bound = bind(model, batch)
    whole = stream_rows(bound, batch)[0].flat()
    for size in (1, 2, 4):
        parts = [
            stream_rows(bound, dattri.take(batch, slice(at, at + size)))[0].flat()
            for at in range(0, 9, size)
        ]
        assert (torch.cat(parts) - whole).abs().max() < 1e-12
    order = torch.randperm(9)
    assert (
        stream_rows(bound, dattri.take(batch, order))[0].flat() - whole[order]
    ).abs().max() < 1e-12


def test_modules_are_documented() -> None:
    for module in (per_example, rules):
        assert module.__doc__
