"""Wrong second derivatives are found from a few examples, and right ones are never accused."""

import logging

import pytest
import torch
from oracles.toy_tasks import (
    cross_entropies,
    dense_hessian,
    examples,
    flat_gradients,
    labels,
    mlp,
    normal,
)
from torch import nn
from torch.nn import functional as F

import dattri_core as dattri
from dattri_core import InputError, NumericsError, Task, symmetry
from dattri_core.evaluate import Evaluator


class _HalfForgotten(torch.autograd.Function):
    """a b, whose backward pass hides from autograd that the slope of b is a."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, slope):
        a, b = ctx.saved_tensors
        return slope * b, slope * a.detach()


class _Stopped(torch.autograd.Function):
    """tanh, whose slope autograd takes to be constant: a wrong Hessian that is symmetric."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return slope * (1 - torch.tanh(x.detach()) ** 2)


class Scaled(nn.Module):
    """A layer times a learned scale, as weight normalisation has one."""

    def __init__(self, inputs, outputs, multiply):
        super().__init__()
        self.weight = nn.Parameter(normal(outputs, inputs, seed=3) / inputs**0.5)
        self.scale = nn.Parameter(1 + normal(outputs, 1, seed=4) / 4)
        self.multiply = multiply

    def forward(self, x):
        wide = self.scale.expand_as(self.weight)
        return F.linear(x, self.multiply(self.weight, wide))


def scaled(multiply):
    first, *rest = mlp((6, 5, 3))
    return nn.Sequential(Scaled(4, 6, multiply), nn.Tanh(), first, *rest)


class Stopped(nn.Module):
    def forward(self, x):
        return _Stopped.apply(x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        return self.head(F.relu(x + self.norm(self.conv(x))).mean((2, 3)))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.embed(x)).mean(1))


class Narrow(nn.Module):
    """Normalises in float32 whatever the precision around it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.last(wide.to(x.dtype))


def right(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = {
            "mlp": lambda: nn.Sequential(
                nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
            ),
            "resnet": Residual,
            "attention": Attending,
            "narrow": Narrow,
        }[name]()
    inputs = normal(5, 4, seed=1)
    if name == "resnet":
        inputs = normal(5, 1, 8, 8, seed=1)
    if name == "attention":
        inputs = labels(35, 9, 1).reshape(5, 7)
    return made.eval(), (inputs, labels(5, 3, 2))


def look(model, batch, **options):
    task = Task(model, **options)
    evaluator = Evaluator(task, task.checkpoints[0], tuple(part[:2] for part in batch))
    symmetry.require_sound(evaluator, batch, evaluator.selected)
    return task


def to(batch, dtype):
    return tuple(part.to(dtype) if part.is_floating_point() else part for part in batch)


HESSIAN = {
    "if-explicit": {},
    "if-cg": {},
    "if-arnoldi": {},
    "if-lissa": {"curvature": "hessian", "batch": None},
}


# --- wrong ones -----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", HESSIAN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_solver_of_the_hessian_refuses_a_wrong_second_derivative(method, dtype):
    model = scaled(_HalfForgotten.apply).to(dtype)
    train, test = (to(examples(n, seed=s), dtype) for n, s in ((9, 100), (3, 300)))
    fields = {"damping": 3.0, **HESSIAN[method]}
    with pytest.raises(NumericsError, match=r"not symmetric: on 4 train.*'ggn', replace"):
        dattri.attribute(Task(model), train, test, method=method, **fields)


def test_the_model_whose_product_is_right_gives_the_dense_solution():
    """The same but for the product of the two: what was refused was its second derivative."""
    model = scaled(torch.mul)
    train, test = examples(9), examples(3, seed=300)
    damped = dense_hessian(model, train, 3.0)
    rows, queries = (flat_gradients(model, cross_entropies(batch)) for batch in (train, test))
    want = rows @ torch.linalg.solve(damped, queries.T)
    fields = {"damping": 3.0, "tolerance": 1e-12}
    got = dattri.attribute(Task(model), train, test, method="if-cg", **fields).values
    assert (got - want).abs().max() < 1e-9 * want.abs().max()


def test_the_ggn_takes_what_the_hessian_refuses():
    """It is not asked for a second derivative of the model."""
    train, test = examples(9), examples(3, seed=300)
    fields = {"damping": 0.5, "curvature": "ggn", "tolerance": 1e-12}
    got, want = (
        dattri.attribute(Task(scaled(multiply)), train, test, method="if-cg", **fields).values
        for multiply in (_HalfForgotten.apply, torch.mul)
    )
    assert (got - want).abs().max() < 1e-10 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_small_part_that_is_wrong_is_found(dtype):
    """The wrong product is worth a thousandth of the model."""
    model = scaled(lambda a, b: a * b + 1e-3 * _HalfForgotten.apply(a, b)).to(dtype)
    with pytest.raises(NumericsError, match="not symmetric"):
        look(model, to(examples(5), dtype))


def test_a_symmetric_hessian_that_is_no_slope_of_the_gradient_is_told(caplog):
    first, _, last = mlp()
    with caplog.at_level(logging.WARNING, "dattri"):
        look(nn.Sequential(first, Stopped(), last), examples(5))
    assert "not the slope of the gradient" in caplog.text


# --- right ones -----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sure", [1.0, 30.0])
@pytest.mark.parametrize("name", ["mlp", "resnet", "attention", "narrow"])
def test_a_right_model_is_not_accused(name, sure, dtype, caplog):
    model, batch = right(name)
    batch, model = to(batch, dtype), model.to(dtype)
    with torch.no_grad():
        list(model.parameters())[-2].mul_(sure)
        if sure > 1:
            batch = batch[0], model(batch[0]).argmax(1)
    with caplog.at_level(logging.WARNING, "dattri"):
        look(model, batch)
    # In float32, a sure softmax may have few true digits.
    told = caplog.text if sure == 1 or dtype != torch.float32 else ""
    assert not told


class Cast(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_computes_in_half_precision_is_not_accused(seed, caplog):
    """Its weights and its loss are in float32; rounding is that of bfloat16."""
    torch.manual_seed(seed)
    layers = nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)
    inputs = normal(5, 4, seed=seed).float()
    look(Cast(nn.Sequential(*layers)), (inputs, labels(5, 3, seed)))
    assert "not the slope" not in caplog.text


@pytest.mark.parametrize("sure", [500.0, 5000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("loss", ["cross-entropy", "logarithm"])
def test_a_model_without_a_doubt_is_not_accused(loss, dtype, sure):
    """Its Hessian is so small that squares of it are zero, or rounded away altogether."""
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        model.append(nn.Linear(32, 5)).to(dtype)
        inputs = torch.randn(6, 20, dtype=dtype)
        with torch.no_grad():
            for value in model[-1].parameters():
                value.mul_(sure)
            batch = inputs, model(inputs).argmax(1)
        look(model, batch, loss=naive if loss == "logarithm" else loss)


def naive(model, batch):
    shares = torch.softmax(model(batch[0]), 1)
    return -torch.log(shares.gather(1, batch[1][:, None])[:, 0] + 1e-30)


@pytest.mark.parametrize("split", [True, False])
def test_a_saturated_softmax_has_few_true_digits(split, caplog, monkeypatch):
    """p (1 - p) of p = 1 - 1e-6 in float32: its rounding is no wrong derivative, and is told."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).float()
    inputs = normal(4, 4, seed=1).float()
    with torch.no_grad():
        model[0].weight.copy_(normal(6, 4, seed=2))
        model[2].weight.copy_(normal(3, 6, seed=3))
        model[2].bias.zero_()
        best = model(inputs).sort(1).values
        model[2].weight.mul_(14 / (best[:, -1] - best[:, -2]).min())
    batch = inputs, model(inputs).argmax(1)
    loss = "cross-entropy"
    if not split:

        @dattri.functional
        def loss(parameters, batch):
            outputs = torch.func.functional_call(model, parameters, (batch[0],))
            return F.cross_entropy(outputs, batch[1], reduction="none")

    with caplog.at_level(logging.WARNING, "dattri"):
        look(model, batch, loss=loss)
    assert "relative rounding (a saturated criterion in float32)" in caplog.text
    monkeypatch.setattr(symmetry._Probe, "_outputs", symmetry._Probe._loss)
    monkeypatch.setattr(symmetry, "SHRINK", (1,))
    with pytest.raises(NumericsError, match="not symmetric"):  # but for the second look
        look(model, batch, loss=loss)


def test_a_wrong_derivative_of_a_functional_loss_is_found():
    model, batch = scaled(_HalfForgotten.apply), examples(5)

    @dattri.functional
    def loss(parameters, batch):
        outputs = torch.func.functional_call(model, parameters, (batch[0],))
        return F.cross_entropy(outputs, batch[1], reduction="none")

    with pytest.raises(NumericsError, match="not symmetric"):
        look(model, batch, loss=loss)


def test_kinks_at_the_weights_are_no_wrong_slope(caplog):
    """Units of zero weights, whose gradient jumps there."""
    model = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 3)).double()
    with torch.no_grad():
        model[0].weight[:25].zero_()
        model[0].bias.zero_()
        model[2].weight.copy_(normal(3, 50, seed=1))
    with caplog.at_level(logging.WARNING, "dattri"):
        look(model, examples(5))
    assert not caplog.text


def test_it_is_looked_at_once_for_a_task_and_draws_no_global_number(monkeypatch):
    looked = []
    run = symmetry._Probe.run
    monkeypatch.setattr(symmetry._Probe, "run", lambda probe: (looked.append(1), run(probe)))
    task, train, test = Task(mlp()), examples(9), examples(3, seed=300)
    state = torch.random.get_rng_state()
    for _ in range(2):
        dattri.attribute(task, train, test, method="if-cg", damping=3.0)
    dattri.attribute(task, train, test, method="if-cg", damping=3.0, curvature="ggn")
    assert len(looked) == 1
    assert torch.equal(torch.random.get_rng_state(), state)


# --- losses of a whole batch --------------------------------------------------------------------
def of_batch(model, weight, reduction):
    """Return the scalar loss of a batch, as a function of parameters."""

    @dattri.functional
    def loss(parameters, batch):
        outputs = torch.func.functional_call(model, parameters, (batch[0],))
        return F.cross_entropy(outputs, batch[1], weight=weight, reduction=reduction)

    return loss


@pytest.mark.parametrize("method", ["if-cg", "if-explicit", "if-lissa"])
def test_a_mean_that_is_none_of_its_examples_has_no_hessian_of_them(method):
    """The labels of all examples that a sample is taken from are alike."""
    model, (inputs, _) = mlp(), examples(20)
    rare = torch.zeros(20, dtype=torch.long)
    rare[[1, 4, 6]] = 2
    common = torch.zeros(20, dtype=torch.long)
    weight = torch.tensor([1.0, 1.0, 5.0], dtype=torch.float64)
    test = examples(3, seed=300)
    options = {"method": method, "source": "functional", "damping": 3.0, "curvature": "hessian"}
    options |= {"depth": 20} if method == "if-lissa" else {}
    task = Task(model, of_batch(model, weight, "mean"))
    with pytest.raises(InputError, match=r"examples together give .* one by one is"):
        dattri.attribute(task, (inputs, rare), test, **options)
    dattri.attribute(task, (inputs, common), test, **options)


def test_a_sum_and_a_mean_of_a_batch_have_the_hessian_of_the_mean_loss():
    model, train, test = mlp(), examples(20), examples(3, seed=300)
    options = {"method": "if-cg", "damping": 3.0, "tolerance": 1e-12}
    expected = dattri.attribute(Task(model), train, test, **options).values
    for reduction in ("sum", "mean"):
        task = Task(model, of_batch(model, None, reduction))
        found = dattri.attribute(task, train, test, source="functional", **options).values
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
