"""Shipped losses and targets against torch and against arithmetic by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dattri_core as dattri
from dattri_core import shipped_losses
from dattri_core.criteria import hessian_factor, softmax_factor
from dattri_core.shipped_losses import as_loss, as_target


class Echo(nn.Module):
    """Returns its first argument."""

    def forward(self, inputs):
        return inputs


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_cross_entropy_logit_and_margin(n, classes, seed):
    logits = 3 * seeded(n, classes, seed=seed)
    labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    losses = dattri.cross_entropy(Echo(), (logits, labels))
    margins = dattri.margin.function(Echo(), (logits, labels))
    picked = dattri.logit.function(Echo(), {"inputs": logits, "labels": labels})
    for b in range(n):
        exponents = [math.exp(v) for v in logits[b].tolist()]
        p = exponents[labels[b]] / sum(exponents)
        assert losses[b].item() == pytest.approx(-math.log(p), rel=1e-12, abs=1e-12)
        rest = (sum(exponents) - exponents[labels[b]]) / sum(exponents)
        assert margins[b].item() == pytest.approx(math.log(p / rest), rel=1e-9, abs=1e-9)
        assert picked[b].item() == logits[b, labels[b]].item()


def test_a_margin_is_exact_where_p_rounds_to_one():
    logits = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64)
    margin = dattri.margin.function(Echo(), (logits, torch.tensor([0])))
    assert margin.item() == pytest.approx(60 - math.log(2), rel=1e-14)


def test_targets_say_which_way_is_better():
    assert dattri.margin.higher_is_better
    assert dattri.logit.higher_is_better


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_squared_error_is_half_the_sum_over_outputs(n, outputs, seed):
    got, want = seeded(n, outputs, seed=seed), seeded(n, outputs, seed=seed + 1)
    losses = dattri.squared_error(Echo(), (got, want))
    for b in range(n):
        by_hand = (
            sum((g - w) ** 2 for g, w in zip(got[b].tolist(), want[b].tolist(), strict=True)) / 2
        )
        assert losses[b].item() == pytest.approx(by_hand, rel=1e-12)
    flat = dattri.squared_error(Echo(), (got[:, :1], want[:, 0]))  # [B, 1] against [B]
    assert flat.shape == (n,)
    torch.testing.assert_close(flat, (got[:, 0] - want[:, 0]).square() / 2)


@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_causal_lm_sums_shifted_tokens_and_ignores(n, length, seed, as_mapping):
    generator = torch.Generator().manual_seed(seed)
    vocabulary = 5
    logits = seeded(n, length, vocabulary, seed=seed)
    labels = torch.randint(vocabulary, (n, length), generator=generator)
    labels[torch.rand(n, length, generator=generator) < 0.3] = -100
    batch = {"inputs": logits, "labels": labels} if as_mapping else (logits, labels)
    losses = dattri.causal_lm(Echo(), batch)
    logp = logits.log_softmax(-1)
    for b in range(n):
        by_hand = -sum(
            logp[b, t - 1, labels[b, t]].item() for t in range(1, length) if labels[b, t] != -100
        )
        assert losses[b].item() == pytest.approx(by_hand, rel=1e-12, abs=1e-12)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_token_cross_entropy_sums_labels_in_place_and_ignores(n, length, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = seeded(n, length, 5, seed=seed)
    labels = torch.randint(5, (n, length), generator=generator)
    labels[torch.rand(n, length, generator=generator) < 0.3] = -100
    losses = dattri.token_cross_entropy(Echo(), (logits, labels))
    margins = dattri.token_cross_entropy.margin(logits, (logits, labels))
    residuals = dattri.token_cross_entropy.residual(logits, (logits, labels))
    p = logits.softmax(-1)
    for b in range(n):
        of = [p[b, t, labels[b, t]].item() for t in range(length) if labels[b, t] != -100]
        assert losses[b].item() == pytest.approx(-sum(map(math.log, of)), rel=1e-12, abs=1e-12)
        odds = sum(math.log(one / (1 - one)) for one in of)
        assert margins[b].item() == pytest.approx(odds, rel=1e-9, abs=1e-9)
        left = sum(1 - one for one in of) / max(1, len(of))
        assert residuals[b].item() == pytest.approx(left, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("loss", "shape", "labels", "message"),
    [
        ("cross-entropy", (2, 4, 3), (2, 4), r"\(2, 4, 3\); expected \[examples, classes\].*token"),
        (
            "token-cross-entropy",
            (2, 3),
            (2,),
            r"\(2, 3\) and labels of shape \(2,\).*'cross-entropy'",
        ),
        ("causal-lm", (2, 5, 3), (2, 4), r"\(2, 5, 3\) and labels of shape \(2, 4\); expected"),
    ],
)
def test_outputs_that_do_not_fit_the_labels_are_refused(loss, shape, labels, message):
    with pytest.raises(dattri.InputError, match=message):
        as_loss(loss)(Echo(), (torch.zeros(shape), torch.zeros(labels, dtype=torch.long)))


def test_causal_lm_of_nothing_but_ignored_tokens_is_zero():
    losses = dattri.causal_lm(Echo(), (seeded(2, 3, 5), torch.full((2, 3), -100)))
    assert losses.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.zeros(2)}, r"the batch has keys \['input_ids'\]"),
        (torch.zeros(2), "has no labels"),
        ((torch.zeros(2),), "has no labels"),
    ],
)
def test_labels_that_are_not_there(batch, message):
    with pytest.raises(dattri.InputError, match=message):
        dattri.labels_of(batch)


def test_names_of_losses_and_targets():
    assert as_loss("causal-lm") is dattri.causal_lm
    assert as_target("margin") is dattri.margin
    assert as_target("loss") is None
    with pytest.raises(dattri.InputError, match="did you mean 'cross-entropy'"):
        as_loss("crossentropy")
    with pytest.raises(dattri.InputError, match="did you mean 'margin'"):
        as_target("margins")
    with pytest.raises(dattri.InputError, match="neither a name nor a function"):
        as_loss(3)
    with pytest.raises(dattri.InputError, match="higher_is_better"):
        as_target(lambda model, batch: 0)
    with pytest.raises(dattri.InputError, match="takes outputs and labels"):
        as_loss(nn.CrossEntropyLoss())


# --- in the outputs: drawn labels and factors ---------------------------------------------------
def output_hessian(loss, outputs, batch):
    """Return the Hessian of each example's criterion in its outputs, ``[B, K, K]``."""
    found = []
    for b in range(len(outputs)):
        one = dattri.take(batch, slice(b, b + 1))
        whole = torch.autograd.functional.hessian(
            lambda out, one=one: loss.criterion(out, one).sum(), outputs[b : b + 1]
        )
        size = outputs[b].numel()
        found.append(whole.reshape(size, size))
    return torch.stack(found)


def squares(factor):
    flat = factor.flatten(2)
    return torch.einsum("kbi,kbj->bij", flat, flat)


def case(name, n=4, seed=0):
    """Return outputs and a batch of a shipped loss, some labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    if name == "cross-entropy":
        labels = torch.randint(5, (n,), generator=generator)
        labels[1] = -100
        return 2 * seeded(n, 5, seed=seed), (torch.zeros(n), labels)
    if name == "squared-error":
        return seeded(n, 2, 3, seed=seed), (torch.zeros(n), seeded(n, 6, seed=seed + 1))
    labels = torch.randint(3, (n, 4), generator=generator)
    labels[0, 2:] = -100
    labels[2] = -100
    return 2 * seeded(n, 4, 3, seed=seed), {"labels": labels}


SHIPPED = sorted(shipped_losses.LOSSES)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("generic", [False, True])
def test_a_factor_is_a_root_of_the_hessian_in_the_outputs(name, generic):
    loss = as_loss(name)
    outputs, batch = case(name)
    if generic:
        factor = hessian_factor(lambda out: loss.criterion(out, batch), outputs, name)
    else:
        factor = loss.factor(outputs, batch)
    assert factor.shape[1:] == outputs.shape
    torch.testing.assert_close(
        squares(factor), output_hessian(loss, outputs, batch), rtol=0, atol=1e-13
    )
    sizes = {
        "cross-entropy": 4,
        "squared-error": 6,
        "causal-lm": 3 * 2,
        "token-cross-entropy": 4 * 2,
    }
    assert generic or len(factor) == sizes[name]


@pytest.mark.parametrize("name", SHIPPED)
def test_columns_that_an_example_does_not_have_are_exactly_zero(name):
    loss = as_loss(name)
    outputs, batch = case(name)
    generic = hessian_factor(lambda out: loss.criterion(out, batch), outputs, name)
    rank = torch.linalg.matrix_rank(output_hessian(loss, outputs, batch), hermitian=True)
    for factor in (generic, loss.factor(outputs, batch)):
        assert torch.equal(factor.flatten(2).any(-1).sum(0), rank)


def test_the_softmax_factor_holds_for_sure_models_and_masked_classes():
    inf = float("inf")
    logits = torch.tensor(
        [
            [800.0, 0.0, 1.0, -700.0],
            [-700.0, 1.0, 0.0, 800.0],
            [0.0, -inf, 2.0, 1.0],
            [1.0, 0.0, 2.0, -inf],
            [3.0, -inf, -inf, -inf],
            [-inf, -inf, -inf, 3.0],
        ],
        dtype=torch.float64,
    )
    p = logits.softmax(1)
    factor = softmax_factor(logits, torch.ones(6))
    want = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert factor.shape == (3, 6, 4)
    torch.testing.assert_close(squares(factor), want, rtol=0, atol=1e-15)
    sure = softmax_factor(torch.tensor([[40.0, 0.0]], dtype=torch.float64), torch.ones(1))
    assert squares(sure)[0, 1, 1].item() == pytest.approx(math.exp(-40), rel=1e-12)


def test_a_factor_in_half_precision_is_computed_in_more():
    logits = 2 * seeded(3, 6)
    low = softmax_factor(logits.bfloat16(), torch.ones(3))
    assert low.dtype == torch.bfloat16
    want = softmax_factor(logits.bfloat16().double(), torch.ones(3))
    torch.testing.assert_close(low.double(), want, rtol=2**-8, atol=1e-6)


def test_soft_labels_weigh_the_curvature_by_their_sum():
    outputs, labels = seeded(3, 4), torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [2, 0, 1, 0]])
    batch = (outputs, labels.double())
    factor = dattri.cross_entropy.factor(outputs, batch)
    want = output_hessian(dattri.cross_entropy, outputs, batch)
    torch.testing.assert_close(squares(factor), want, rtol=0, atol=1e-13)


def test_a_criterion_that_is_not_convex_has_no_factor():
    with pytest.raises(dattri.NumericsError, match=r"'bent'.*eigenvalue -.*at example 1.*convex"):
        hessian_factor(
            lambda out: (out[:, 0] ** 3).sin() + out.square().sum(1),
            torch.tensor([[0.0, 1.0], [1.2, 1.0]], dtype=torch.float64),
            "bent",
        )


def test_a_linear_criterion_has_an_empty_factor():
    factor = hessian_factor(lambda out: out.sum(1), seeded(2, 3), "linear")
    assert not factor.any()


def test_a_hessian_in_many_outputs_is_refused():
    with pytest.raises(dattri.InputError, match=r"1025 outputs.*factor="):
        hessian_factor(lambda out: out.square().sum(1), torch.zeros(1, 1025), "wide")


@pytest.mark.parametrize("name", ["cross-entropy", "causal-lm", "token-cross-entropy"])
def test_a_sample_is_the_slope_for_the_label_that_its_number_picks(name):
    """Midpoints between the steps of the distribution function enumerate all labels exactly."""
    loss = as_loss(name)
    outputs, batch = case(name)
    shift = int(name == "causal-lm")
    logits = outputs[:, : outputs.shape[1] - shift]
    p = logits.softmax(-1)
    upper = p.cumsum(-1)
    for label in range(p.shape[-1]):
        numbers = upper[..., label] - p[..., label] / 2
        slope = loss.sample(outputs, batch, lambda *shape, n=numbers: n.reshape(len(n), *shape))
        labels = dattri.labels_of(batch).clone()
        later = labels[shift:] if name == "cross-entropy" else labels[:, shift:]
        later[later != -100] = label
        free = outputs.clone().requires_grad_()
        loss.criterion(free, {"labels": labels}).sum().backward()
        torch.testing.assert_close(slope, free.grad, rtol=0, atol=1e-14)


def test_uniform_numbers_at_the_ends_pick_a_label():
    logits = seeded(2, 3)
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    slope = dattri.cross_entropy.sample(logits, (logits, torch.zeros(2).long()), lambda: ends)
    want = logits.softmax(1) - torch.eye(3, dtype=torch.float64)[[0, 2]]
    torch.testing.assert_close(slope, want)
    flat = dattri.squared_error.sample(logits[:, :1], (logits, logits), lambda _: ends[:, None])
    assert torch.isfinite(flat).all()
    assert flat[0] < -8 < 8 < flat[1]


def test_squared_error_draws_standard_normal_numbers():
    n = 20000
    uniform = torch.rand(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = dattri.squared_error.sample(
        torch.zeros(n, 2, dtype=torch.float64), (None, torch.zeros(n, 2)), lambda _: uniform
    )
    assert slope.mean(0).abs().max() < 4 / n**0.5
    assert (slope.T @ slope / n - torch.eye(2)).abs().max() < 6 / n**0.5
