"""Shipped losses and targets against torch and against arithmetic by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dattri_core as dattri
from dattri_core.losses import as_loss, as_target, forward_of


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


def test_causal_lm_of_nothing_but_ignored_tokens_is_zero():
    losses = dattri.causal_lm(Echo(), (seeded(2, 3, 5), torch.full((2, 3), -100)))
    assert losses.tolist() == [0.0, 0.0]


def test_outputs_are_found_in_structured_answers():
    class Answer(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, x, scale=1.0):
            return self.wrap(x * scale)

    class Named:
        def __init__(self, logits):
            self.logits = logits

    x, y = torch.ones(2, 3), torch.zeros(2)
    for wrap in (lambda t: t, Named, lambda t: {"logits": t}, lambda t: (t, None)):
        assert torch.equal(forward_of(Answer(wrap), (x, y)), x)
        assert torch.equal(forward_of(Answer(wrap), {"x": x, "scale": 2.0, "labels": y}), 2 * x)
        assert torch.equal(forward_of(Answer(wrap), {"x": x, "label": y}), x)
    with pytest.raises(dattri.InputError, match=r"neither a tensor nor has \.logits"):
        forward_of(Answer(lambda t: "text"), (x, y))


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
