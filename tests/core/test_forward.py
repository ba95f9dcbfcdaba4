"""What a model is called with, and what of its answer is taken."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dattri_core as dattri
from dattri_core.forward import forward_of


class Caching(nn.Module):
    """As a causal model of Hugging Face: it keeps keys and values unless told not to."""

    config = SimpleNamespace(use_cache=True)

    def forward(self, input_ids, use_cache=None):
        self.asked = use_cache
        return SimpleNamespace(logits=input_ids * 1.0)


class Decoding(nn.Module):
    """As BART, which shifts the *inputs* where it is given nothing to decode."""

    def forward(self, input_ids, decoder_input_ids=None, decoder_inputs_embeds=None):
        given = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        return SimpleNamespace(logits=input_ids if given is None else given)

    def prepare_decoder_input_ids_from_labels(self, labels):
        return nn.functional.pad(labels[:, :-1], (1, 0), value=9).masked_fill(labels == -100, 0)


class Wrapped(nn.Module):
    """As a model of PEFT: its own forward takes anything."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_base_model(self):
        return self.model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def test_no_keys_and_values_are_kept_for_a_next_token():
    words = torch.arange(6).reshape(2, 3)
    for model in (Caching(), Wrapped(Caching())):
        forward_of(model, {"input_ids": words, "labels": words})
        inner = getattr(model, "model", model)
        assert inner.asked is False
        forward_of(model, {"input_ids": words, "labels": words, "use_cache": True})
        assert inner.asked is True
        forward_of(model, (words, words))  # by position: it is called as it is
        assert inner.asked is None


def test_a_model_that_knows_no_cache_is_not_asked():
    class Plain(Caching):
        def forward(self, input_ids):
            return input_ids

    class Own(nn.Module):  # not of Hugging Face: what its argument means is not known
        def forward(self, x, use_cache=True):
            return x if use_cache else 2 * x

    x = torch.ones(2)
    assert torch.equal(forward_of(Plain(), {"input_ids": x, "labels": x}), x)
    assert torch.equal(forward_of(Own(), {"x": x, "labels": x}), x)


def test_a_decoder_is_given_the_labels_before_each():
    labels = torch.tensor([[4, 5, 6], [7, 8, -100]])
    batch = {"input_ids": torch.zeros(2, 5), "labels": labels}
    want = torch.tensor([[9, 4, 5], [9, 7, 0]])
    for model in (Decoding(), Wrapped(Decoding())):
        assert torch.equal(forward_of(model, batch), want)
        own = torch.ones(2, 3)
        assert torch.equal(forward_of(model, {**batch, "decoder_input_ids": own}), own)
        assert torch.equal(forward_of(model, {**batch, "decoder_inputs_embeds": own}), own)
        unlabelled = {"input_ids": batch["input_ids"], "decoder_input_ids": own}
        assert torch.equal(forward_of(model, unlabelled), own)


def test_outputs_are_found_in_structured_answers():
    class Answer(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, x, scale=1.0):
            return self.wrap(x * scale)

    x, y = torch.ones(2, 3), torch.zeros(2)
    kinds = (lambda t: t, lambda t: SimpleNamespace(logits=t), lambda t: {"logits": t})
    for wrap in (*kinds, lambda t: (t, None)):
        assert torch.equal(forward_of(Answer(wrap), (x, y)), x)
        assert torch.equal(forward_of(Answer(wrap), {"x": x, "scale": 2.0, "labels": y}), 2 * x)
        assert torch.equal(forward_of(Answer(wrap), {"x": x, "label": y}), x)
    with pytest.raises(dattri.InputError, match=r"neither a tensor nor has \.logits"):
        forward_of(Answer(lambda t: "text"), (x, y))
