"""Hessian- and GGN-vector products against dense float64 Hessians."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.dense import call, flatten, ggn_of, hessian_of, parameters_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from dattri_core import products
from dattri_core.activations import activation_bytes
from dattri_core.errors import InputError, NumericsError
from dattri_core.evaluate import Evaluator
from dattri_core.losses import Loss, functional, labels_of
from dattri_core.products import batch_product, plan_slices
from dattri_core.shipped_losses import causal_lm, cross_entropy
from dattri_core.task import Task

KINDS = ("hessian", "ggn")


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 2, padding=1, bias=True)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        hidden = nn.functional.avg_pool2d(torch.tanh(self.norm(self.conv(x))), 2)
        return self.head(hidden.flatten(1))


class Language(nn.Module):
    def __init__(self, attention=False):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True) if attention else None
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)

    def forward(self, input_ids):
        hidden = self.norm(self.embed(input_ids))
        if self.attention is not None:
            hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        seen = hidden.cumsum(1)
        return self.head(torch.tanh(self.mix(seen)) + hidden)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = checkpoint(lambda v: torch.tanh(self.first(v)), x, use_reentrant=False)
        return self.second(hidden)


class Branching(nn.Module):
    """Refuses torch.func: a Python branch on its numbers inside of a custom function."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 3 * x**2 * grad

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.Cube.apply(self.first(x))
        hidden.mul_(2.0)
        return self.second(hidden if float(hidden.detach().sum()) > -1e9 else hidden * 0)


def classification(model, *shape, count=4):
    return model, cross_entropy, (torch.randn(count, *shape).double(), torch.arange(count) % 3)


def language(attention):
    tokens = torch.randint(0, 5, (3, 4))
    labels = tokens.clone()
    labels[0, 2] = -100
    return Language(attention), causal_lm, {"input_ids": tokens, "labels": labels}


MAKERS = {
    "linear": lambda: classification(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), 3),
    "relu": lambda: classification(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), 3),
    "conv": lambda: classification(Convolutional(), 2, 3, 3),
    "language": lambda: language(False),
    "attention": lambda: language(True),
    "recurrent": lambda: classification(Recurrent(), 3, 3),
    "checkpointed": lambda: classification(Checkpointed(), 3),
    "branching": lambda: classification(Branching(), 3),
}
REFUSING = {"checkpointed", "branching"}


def world(name, seed=0):
    torch.manual_seed(seed)
    model, loss, batch = MAKERS[name]()
    model = model.double().eval()
    return made(model, loss, batch)


def made(model, loss, batch, **options):
    task = Task(model, loss, **options)
    return Evaluator(task, task.checkpoints[0], batch), batch


def inputs_of(batch):
    return (batch["input_ids"],) if isinstance(batch, dict) else batch[:-1]


def oracle(evaluator, batch, kind, names=None):
    """Return the dense curvature of the summed loss in the attributed parameters."""
    model, loss = evaluator.task.model, evaluator.task.loss
    everything = parameters_of(model)
    at = {n: everything[n] for n in names or everything}

    def outputs(parameters):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return call(model, {**everything, **parameters}, *inputs_of(batch))

    if kind == "ggn":
        return ggn_of(outputs, lambda out: loss.criterion(out, batch), at)
    return hessian_of(lambda p: loss.criterion(outputs(p), batch).sum(), at)


def vectors_of(evaluator, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(count, *value.shape, generator=generator, dtype=torch.float64)
        for name, value in evaluator.selected.items()
    }


def gap(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAKERS)
def test_products_equal_the_dense_curvature(name, kind, caplog):
    evaluator, batch = world(name)
    vectors = vectors_of(evaluator, 5)
    with caplog.at_level(logging.WARNING, logger="dattri"):
        for _ in range(2):
            found = batch_product(evaluator, batch, vectors, kind)
    expected = flatten(vectors, 1) @ oracle(evaluator, batch, kind)
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in vectors.items()}
    assert gap(flatten(found, 1), expected) < 1e-11
    # Refused by torch.func: said once for a model, not once a batch.
    assert len(caplog.records) == int(name in REFUSING)
    assert (evaluator in products._refusing) == (name in REFUSING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "conv", "language", "attention"])
def test_both_ways_agree(name, kind):
    evaluator, batch = world(name)
    vectors = vectors_of(evaluator, 3)
    fast = flatten(batch_product(evaluator, batch, vectors, kind), 1)
    products._refusing.add(evaluator)
    slow = flatten(batch_product(evaluator, batch, vectors, kind), 1)
    assert gap(fast, slow) < 1e-13


def test_hessian_equals_finite_differences_of_gradients():
    evaluator, batch = world("conv")
    model, step = evaluator.task.model, 1e-5
    vectors = vectors_of(evaluator, 2)
    found = batch_product(evaluator, batch, vectors, "hessian")
    for row in range(2):
        sides = []
        for sign in (1, -1):
            moved = {
                n: (p.detach() + sign * step * vectors[n][row]).requires_grad_()
                for n, p in model.named_parameters()
            }
            loss = evaluator.criterion(call(model, moved, batch[0]), batch).sum()
            sides.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, moved.values())])
            )
        expected = (sides[0] - sides[1]) / (2 * step)
        assert gap(flatten({n: v[row] for n, v in found.items()}), expected) < 1e-7


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from([1, 3_000, 30_000, 10**9]),
)
def test_slices_do_not_change_the_result(kind, count, examples, limit):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = (torch.randn(examples, 3).double(), torch.arange(examples) % 3)
    evaluator, _ = made(model, cross_entropy, batch)
    vectors = vectors_of(evaluator, count)
    found = flatten(batch_product(evaluator, batch, vectors, kind, limit=limit), 1)
    assert gap(found, flatten(vectors, 1) @ oracle(evaluator, batch, kind)) < 1e-12


def test_slices_fit_the_limit_and_cover_the_work():
    torch.manual_seed(0)
    batch = (torch.randn(64, 30), torch.arange(64) % 3)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 3))
    evaluator, _ = made(model, cross_entropy, batch)
    vectors = {n: torch.zeros(50, *p.shape) for n, p in evaluator.selected.items()}

    def sizes(limit):
        size = plan_slices(evaluator, batch, vectors, limit)
        return size.vectors, size.examples

    each = 2 * 4 * sum(p.numel() for p in evaluator.selected.values())
    pair = products.TANGENTS * activation_bytes(evaluator, batch)
    assert pair >= products.TANGENTS * 4 * (40 + 3)
    every = each + 64 * pair
    assert sizes(100 * every) == (50, 64)
    # Half of the limit, as long as it holds enough vectors with every example.
    assert sizes(50 * every) == (25, 64)
    assert sizes(2 * products.FEW * every) == (products.FEW, 64)
    # Fewer vectors first, as long as there are enough of them; then fewer examples.
    assert sizes(2 * products.FEW * every - 1) == (13, 64)
    scarce = 3 * products.FEW // 4 * (each + 64 * pair)
    assert sizes(scarce)[0] >= 3 * products.FEW // 4
    assert sizes(scarce)[1] < 64
    for limit in (each + pair, 10**5, 3 * 10**5, 10**6):
        chunk, examples = sizes(limit)
        assert chunk * (each + examples * pair) <= limit
    assert sizes(1) == (1, 1)


@pytest.mark.parametrize("count", [1, 50])
def test_slices_of_large_weights_hold_examples_that_outweigh_the_vectors(count, monkeypatch):
    monkeypatch.setattr(products, "WORK_LIMIT", 1000)  # less than one vector of this network
    batch = (torch.randn(64, 30), torch.arange(64) % 3)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 3))
    evaluator, _ = made(model, cross_entropy, batch)
    vectors = {n: torch.zeros(count, *p.shape) for n, p in evaluator.selected.items()}
    each = 2 * 4 * sum(p.numel() for p in evaluator.selected.values())
    pair = products.TANGENTS * activation_bytes(evaluator, batch)
    size = plan_slices(evaluator, batch, vectors, 10**9)
    assert size.vectors * (each + size.examples * pair) <= products.WEIGHTS * each
    assert size.examples * pair > each
    assert (size.vectors > 1) == (count > 1)
    small = plan_slices(evaluator, batch, vectors, each + pair)  # what there is still counts
    assert (small.vectors, small.examples) == (1, 1)


def test_ggn_of_linear_softmax_regression_equals_its_hessian():
    evaluator, batch = made(
        nn.Linear(4, 3).double(), cross_entropy, (torch.randn(6, 4).double(), torch.arange(6) % 3)
    )
    vectors = vectors_of(evaluator, 4)
    hessian = flatten(batch_product(evaluator, batch, vectors, "hessian"), 1)
    assert gap(flatten(batch_product(evaluator, batch, vectors, "ggn"), 1), hessian) < 1e-12


@pytest.mark.parametrize("name", ["conv", "language"])
def test_ggn_is_positive_where_the_hessian_is_not(name):
    evaluator, batch = world(name)
    size = sum(p.numel() for p in evaluator.selected.values())
    units = torch.eye(size, dtype=torch.float64)
    shapes = {n: p.shape for n, p in evaluator.selected.items()}
    parts = units.split([s.numel() for s in shapes.values()], 1)
    vectors = {n: part.reshape(size, *shapes[n]) for n, part in zip(shapes, parts, strict=True)}
    least = {
        kind: torch.linalg.eigvalsh(
            flatten(batch_product(evaluator, batch, vectors, kind), 1)
        ).aminmax()
        for kind in KINDS
    }
    assert least["ggn"].min > -1e-12 * least["ggn"].max
    assert least["hessian"].min < -1e-3 * least["hessian"].max


def test_parameters_that_are_left_out_are_constants():
    torch.manual_seed(0)
    model, loss, batch = MAKERS["linear"]()
    evaluator, _ = made(model.double(), loss, batch, parameters=["0.weight", "2.bias"])
    vectors = vectors_of(evaluator, 3)
    assert set(vectors) == {"0.weight", "2.bias"}
    for kind in KINDS:
        expected = flatten(vectors, 1) @ oracle(evaluator, batch, kind, list(vectors))
        assert gap(flatten(batch_product(evaluator, batch, vectors, kind), 1), expected) < 1e-12


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_functional_losses_of_any_reduction(reduction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = (torch.randn(5, 3).double(), torch.arange(5) % 3)

    @functional
    def loss(parameters, data):
        logits = call(model, parameters, data[0])
        return nn.functional.cross_entropy(logits, data[1], reduction=reduction)

    evaluator, _ = made(model, loss, batch)
    plain, _ = made(model, cross_entropy, batch)
    vectors = vectors_of(evaluator, 3)
    expected = flatten(vectors, 1) @ oracle(plain, batch, "hessian")
    # A limit that cuts the examples in slices: a mean over a slice must still count its examples.
    found = flatten(batch_product(evaluator, batch, vectors, "hessian", limit=2000), 1)
    assert plan_slices(evaluator, batch, vectors, 2000).examples < 5
    assert gap(found, expected) < 1e-12
    with pytest.raises(InputError, match=r"dattri.Loss\(forward=.*or use the curvature 'hessian'"):
        batch_product(evaluator, batch, vectors, "ggn")


def test_loss_linear_in_the_parameters_has_no_curvature():
    def loss(model, data):
        return model(data[0]).sum(1)

    split = Loss(lambda model, data: model(data[0]), lambda out, data: out.sum(1))
    batch = (torch.randn(3, 2).double(), torch.zeros(3))
    for given_loss, kinds in ((loss, ["hessian"]), (split, KINDS)):
        evaluator, _ = made(nn.Linear(2, 2).double(), given_loss, batch)
        vectors = vectors_of(evaluator, 2)
        for refused in (False, True):
            if refused:
                products._refusing.add(evaluator)
            for kind in kinds:
                found = batch_product(evaluator, batch, vectors, kind)
                assert all(torch.equal(v, torch.zeros_like(v)) for v in found.values())


def test_products_that_are_not_finite_are_named():
    # sqrt at zero: the loss is finite, its second derivative is not.
    loss = Loss(lambda model, data: model(data[0]), lambda out, data: (out.abs().sqrt()).sum(1))
    model = nn.Linear(2, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    evaluator, batch = made(model, loss, (torch.randn(3, 2).double(), torch.zeros(3)))
    for kind in KINDS:
        with pytest.raises(
            NumericsError, match=f"{kind} product.*not finite in 'weight'.*3 examples"
        ):
            batch_product(evaluator, batch, vectors_of(evaluator, 1), kind)


def test_function_whose_second_derivative_torch_takes_for_zero_is_refused():
    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x**2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * 2 * ctx.saved_tensors[0]

    class Model(nn.Linear):
        def forward(self, x):
            return Once.apply(super().forward(x))

    evaluator, batch = made(
        Model(2, 3).double(), cross_entropy, (torch.randn(3, 2).double(), torch.arange(3))
    )
    for kind in KINDS:
        with pytest.raises(
            InputError, match=r"no second derivative.*once_differentiable.*parameters="
        ):
            batch_product(evaluator, batch, vectors_of(evaluator, 1), kind)


def test_reentrant_checkpointing_is_refused_with_the_cure():
    class Model(nn.Linear):
        def forward(self, x):
            return checkpoint(super().forward, x * self.weight.sum(), use_reentrant=True)

    evaluator, batch = made(
        Model(2, 3).double(), cross_entropy, (torch.randn(3, 2).double(), torch.arange(3))
    )
    with pytest.raises(InputError, match=r"no second derivative.*use_reentrant=False"):
        batch_product(evaluator, batch, vectors_of(evaluator, 1), "hessian")


def test_user_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = Convolutional().double().train()
    for module in model.modules():
        module.training = module is not model.norm  # a mixture that must come back
    batch = (torch.randn(4, 2, 3, 3).double(), torch.arange(4) % 3)
    evaluator, _ = made(model, cross_entropy, batch)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    onednn = torch.backends.mkldnn.enabled
    for kind in KINDS:
        batch_product(evaluator, batch, vectors_of(evaluator, 2), kind)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [m.training for m in model.modules()] == [m is not model.norm for m in model.modules()]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.backends.mkldnn.enabled == onednn


def test_kernels_switched_off_for_recurrent_models_come_back():
    evaluator, batch = world("recurrent")
    flags = torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled
    during = []
    evaluator.task.model.register_forward_hook(
        lambda *_: during.append((torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled))
    )
    batch_product(evaluator, batch, vectors_of(evaluator, 1), "hessian")
    assert set(during) == {(False, False)}
    assert (torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled) == flags
    assert flags[1]


def test_single_precision_stays_near_double():
    torch.manual_seed(0)
    model, loss, batch = MAKERS["linear"]()
    exact, _ = made(model.double(), loss, batch)
    vectors = vectors_of(exact, 3)
    expected = flatten(batch_product(exact, batch, vectors, "hessian"), 1)
    single, _ = made(model.float(), loss, (batch[0].float(), labels_of(batch)))
    narrow = {n: v.float() for n, v in vectors.items()}
    found = batch_product(single, (batch[0].float(), batch[1]), narrow, "hessian")
    assert all(v.dtype == torch.float32 for v in found.values())
    assert 1e-9 < gap(flatten(found, 1).double(), expected) < 1e-5
