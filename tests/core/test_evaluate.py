"""Evaluating a task: what is refused before long work, what is computed, what is left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import dattri_core as dattri
from dattri_core import Evaluator, InputError, NumericsError, Task


def data(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (n,), generator=generator)


def linear(seed=0):
    net = nn.Linear(3, 2).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net


def evaluator(model, loss="cross-entropy", batch=None, **options):
    task = Task(model, loss, **options)
    return Evaluator(task, task.checkpoints[0], data() if batch is None else batch)


class Net(nn.Module):
    """A linear layer, then any function."""

    def __init__(self, after):
        super().__init__()
        self.layer = linear()
        self.after = after

    def forward(self, x):
        return self.after(self.layer(x))


# --- refused before long work -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda m, b: F.cross_entropy(m(b[0]), b[1]), r"\(\)"),
        (lambda m, b: m(b[0]), r"\(6, 2\)"),
        (lambda m, b: m(b[0]).sum(1)[:3], r"\(3,\)"),
        (lambda m, b: m(b[0]).sum(1, keepdim=True), r"\(6, 1\)"),
    ],
)
def test_a_loss_that_is_not_per_example(loss, shape):
    with pytest.raises(InputError, match=rf"returned shape {shape} for 6 examples; expected \[6\]"):
        evaluator(linear(), loss)
    target = dattri.Target(loss, higher_is_better=True)
    with pytest.raises(InputError, match=rf"^target 'target': returned shape {shape}"):
        evaluator(linear(), target=target)


def test_a_loss_that_returns_no_tensor():
    with pytest.raises(InputError, match="returned a float, expected a tensor"):
        evaluator(linear(), lambda m, b: 1.0)


MIXERS = {
    "batch mean": lambda h: h - h.mean(0),
    "batch norm without running statistics": nn.BatchNorm1d(2, track_running_stats=False).double(),
    "softmax over examples": lambda h: h.softmax(0),
}


@pytest.mark.parametrize("name", MIXERS)
def test_a_loss_that_mixes_examples(name):
    with pytest.raises(InputError, match="mixes examples") as caught:
        evaluator(Net(MIXERS[name]))
    if "norm" in name:
        assert "track_running_stats=True" in str(caught.value)
        assert "'after'" in str(caught.value)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda v: v])
def test_a_functional_loss_that_mixes_examples(name, reduce):
    net = Net(MIXERS[name])
    loss = functional_of(net, reduce)
    with pytest.raises(InputError, match=r"mix(es)? examples"):
        evaluator(net, loss)


def test_batch_norm_with_running_statistics_is_fine():
    net = Net(nn.BatchNorm1d(2).double()).train()
    evaluator(net)
    assert net.training
    assert net.after.training
    assert net.after.num_batches_tracked == 0


@pytest.mark.parametrize("reduce", [None, torch.mean, torch.sum])
def test_dropout_that_is_active_in_eval_mode(reduce):
    net = Net(lambda h: F.dropout(h, 0.5, training=True))
    loss = "cross-entropy" if reduce is None else functional_of(net, reduce)
    with pytest.raises(InputError, match="different numbers twice"):
        evaluator(net, loss)


def test_random_targets_are_seen_too():
    noisy = dattri.Target(lambda m, b: m(b[0]).sum(1) + torch.rand(1), higher_is_better=True)
    with pytest.raises(InputError, match=r"^target .*different numbers twice"):
        evaluator(linear(), target=noisy)


def test_dropout_modules_are_off():
    evaluator(Net(nn.Dropout(0.5)).train())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(bad):
    net = linear()
    with torch.no_grad():
        net.bias[0] = bad
    with pytest.raises(NumericsError, match="not finite at checkpoint 'current weights'"):
        evaluator(net)
    with pytest.raises(NumericsError, match="not finite at checkpoint 'current weights'"):
        evaluator(net, functional_of(net, torch.mean))
    with pytest.raises(NumericsError, match=r"^target .target.: not finite"):
        evaluator(
            linear(),
            target=dattri.Target(lambda m, b: m(b[0]).sum(1) * bad, higher_is_better=True),
        )


# --- the reduction of a functional loss ---------------------------------------------------------
def functional_of(net, reduce):
    def loss(parameters, batch):
        x, y = batch
        return reduce(F.cross_entropy(functional_call(net, parameters, (x,)), y, reduction="none"))

    return dattri.functional(loss)


REDUCTIONS = [torch.mean, torch.sum, lambda v: v]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("n", [1, 2, 6])
def test_a_functional_loss_is_per_example_whatever_its_reduction(reduce, n):
    net = linear()
    batch = data(n)
    # The engine repeats the first examples when there are fewer than it samples.
    sample = tuple(t[torch.arange(4) % n] for t in batch)
    ev = evaluator(net, functional_of(net, reduce), sample)
    want = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
    torch.testing.assert_close(ev.per_example(None, batch, "train"), want)
    torch.testing.assert_close(ev.total(None, batch, "train"), want.sum())


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("scale", [30.0, 2000.0])
def test_the_reduction_is_found_where_every_loss_is_nearly_zero(reduce, scale):
    # A fitted float32 model: losses of 1e-7 or exactly 0 tell a sum from a mean badly.
    net = nn.Linear(1, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-0.5], [0.5]]) * scale)
        net.bias.zero_()
    x = torch.tensor([[-0.5], [0.5], [0.6], [-0.6]])
    y = torch.tensor([0, 1, 1, 0])
    assert F.cross_entropy(net(x), y).item() < 1e-6
    ev = evaluator(net, functional_of(net, reduce), (x, y))
    wrong = (x, 1 - y)  # the same loss where it is large
    want = F.cross_entropy(net(x), 1 - y, reduction="sum")
    torch.testing.assert_close(ev.total(None, wrong, "train"), want)


def test_a_functional_loss_of_nothing_but_zeros_is_refused():
    with pytest.raises(InputError, match="mean cannot be told from its sum"):
        evaluator(linear(), dattri.functional(lambda p, b: (0 * p["weight"]).sum()))


def test_a_functional_loss_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"shape \(2, 3\) for 6 examples"):
        evaluator(linear(), dattri.functional(lambda p, b: p["weight"]))


# --- what is computed ---------------------------------------------------------------------------
def test_weights_of_the_checkpoint_are_used_and_may_be_replaced():
    net, other = linear(0), linear(1)
    ev = evaluator(net, checkpoints=other.state_dict())
    x, y = data()
    want = F.cross_entropy(other(x), y, reduction="none")
    torch.testing.assert_close(ev.per_example(None, (x, y), "train"), want)
    bias = torch.tensor([1.0, -1.0], dtype=torch.float64)
    want = F.cross_entropy(x @ other.weight.T + bias, y, reduction="none")
    torch.testing.assert_close(ev.per_example({"bias": bias}, (x, y), "train"), want)
    torch.testing.assert_close(ev.total({"bias": bias}, (x, y), "train"), want.sum())


def test_targets_carry_the_sign_on_the_test_side_only():
    net = linear()
    ev = evaluator(net, target="logit")
    x, y = data()
    torch.testing.assert_close(
        ev.per_example(None, (x, y), "test"), -net(x).gather(1, y[:, None])[:, 0]
    )
    torch.testing.assert_close(
        ev.per_example(None, (x, y), "train"), F.cross_entropy(net(x), y, reduction="none")
    )


def test_tied_weights_are_replaced_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False).double()
            self.second = nn.Linear(3, 3, bias=False).double()
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    net = Tied()
    ev = evaluator(net, lambda m, b: m(b[0]).sum(1))
    weight = torch.eye(3, dtype=torch.float64) * 2
    x, y = data()
    torch.testing.assert_close(
        ev.per_example({"first.weight": weight}, (x, y), "train"), 4 * x.sum(1)
    )


class TwoNames(nn.Module):
    """A layer that the model holds under two names, as encoders hold a shared embedding."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        self.head, self.norm = self.net[2], self.net[1]

    def forward(self, x):
        return self.net(x)


def test_a_module_of_two_names_is_left_as_it_was():
    net = TwoNames()
    before = {name: (id(t), t.clone()) for name, t in net.state_dict(keep_vars=True).items()}
    ev = evaluator(net, lambda m, b: m(b[0]).sum(1))
    x, y = data()
    want = net.eval()(x).sum(1)
    torch.testing.assert_close(ev.per_example(None, (x, y), "train"), want)
    zero = {"net.2.weight": torch.zeros(3, 4, dtype=torch.float64)}
    with torch.no_grad():
        torch.testing.assert_close(
            ev.per_example(zero, (x, y), "train"), net.head.bias.sum().expand(len(x))
        )
    after = net.state_dict(keep_vars=True)
    assert {name: id(t) for name, t in after.items()} == {n: at for n, (at, _) in before.items()}
    for name, (_, numbers) in before.items():
        torch.testing.assert_close(after[name], numbers)


def test_outputs_and_criterion():
    net = linear()
    ev = evaluator(net)
    x, y = data()
    torch.testing.assert_close(ev.outputs(None, (x, y)), net(x))
    torch.testing.assert_close(
        ev.criterion(net(x), (x, y)), F.cross_entropy(net(x), y, reduction="none")
    )
    plain = evaluator(net, lambda m, b: m(b[0]).sum(1))
    with pytest.raises(InputError, match="use the curvature 'hessian'"):
        plain.outputs(None, (x, y))


# --- what is left alone -------------------------------------------------------------------------
def test_a_session_restores_every_mode_even_after_an_error():
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout(), nn.Sequential(nn.Dropout())).double()
    net.train()
    net[2].eval()
    modes = [m.training for m in net.modules()]
    assert len(set(modes)) == 2
    ev = evaluator(net)
    assert [m.training for m in net.modules()] == modes
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), ev.session():
        assert not any(m.training for m in net.modules())
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError
    assert [m.training for m in net.modules()] == modes
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_a_failed_check_restores_the_modes():
    net = Net(MIXERS["batch mean"]).train()
    with pytest.raises(InputError):
        evaluator(net)
    assert all(m.training for m in net.modules())


def test_the_model_is_untouched():
    class Counting(Net):
        def __init__(self):
            super().__init__(lambda h: h)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    net = Counting()
    net.layer.bias.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    held = {k: id(v) for k, v in net.named_parameters()}
    ev = evaluator(net, checkpoints=None)
    ev.total({"layer.weight": torch.zeros(2, 3, dtype=torch.float64)}, data(), "train")
    assert {k: id(v) for k, v in net.named_parameters()} == held
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not net.layer.bias.requires_grad
    assert net.layer.weight.grad is None


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch < 2.6 compiles")
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_run_as_it_was_written(in_place):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = Net(torch.tanh)
    train, test = data(), data(2, seed=1)
    want = dattri.attribute(Task(model), train, test, method="if-explicit")
    if in_place:
        model.compile(backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    scores = dattri.attribute(Task(model), train, test, method="if-explicit")
    assert torch.equal(scores.values, want.values)
    assert not compiled
    model(train[0])  # and after it as the user wants it
    assert compiled


@pytest.mark.parametrize("example", [0, 1, 2])
def test_an_example_that_changes_with_the_others_is_found_wherever_it_stands(example):
    x, y = data(3)
    x = x.abs()
    x[example] *= -1

    def mixing(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * (
            1 + (batch[0] > 0).any()
        )

    with pytest.raises(InputError, match=f"mixes examples: the value of example {example} is"):
        evaluator(linear(), mixing, (x, y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("unit", [1.0, 1e-7, 1e-13])
@pytest.mark.parametrize(
    ("fault", "message"), [("mean", "mixes examples"), ("noise", "different numbers twice")]
)
def test_faults_are_found_in_any_unit_of_the_loss(fault, message, unit, dtype):
    net = linear().to(dtype)
    x, y = data()

    def loss(model, batch):
        outputs = model(batch[0])
        if fault == "mean":
            outputs = outputs - outputs.mean(0)
        if fault == "noise":
            outputs = outputs + torch.randn_like(outputs)
        return unit * F.cross_entropy(outputs, batch[1], reduction="none")

    with pytest.raises(InputError, match=message):
        evaluator(net, loss, (x.to(dtype), y))


@pytest.mark.parametrize("sure", [1e2, 1e4])
def test_a_sure_model_is_taken_in_any_dtype(sure):
    for seed, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16) * 4):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 5)).to(dtype)
        x = torch.randn(3, 20).to(dtype)
        with torch.no_grad():
            net[-1].weight.mul_(sure)
            batch = x, net(x).argmax(1)
        evaluator(net, "cross-entropy", batch)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.head = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.read(x.unsqueeze(1))[0][:, 0])


@pytest.mark.parametrize(("model", "left"), [(Recurrent().double(), False), (linear(), True)])
def test_cudnn_is_left_aside_where_a_module_recurs(model, left):
    """It has no backward pass of one in eval mode, and is back after the session."""
    before = torch.backends.cudnn.enabled
    with evaluator(model).session():
        assert torch.backends.cudnn.enabled == (before and left)
    assert torch.backends.cudnn.enabled == before
