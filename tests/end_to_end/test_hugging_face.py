"""Models of Hugging Face, tiny and with random weights: their rows against plain autograd.

Which modules an architecture is made of changes with the releases of transformers, and so does what
they pass on to each other: this is where it is seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles.loops import loop_gradients
from torch import Tensor, nn

import dattri_core as dattri

transformers = pytest.importorskip("transformers")

WORDS, LENGTH, CLASSES = 40, 9, 3
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": CLASSES,
}
T5 = {
    "vocab_size": WORDS,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
}
GPT2 = {"vocab_size": WORDS, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4}
END = {"bos_token_id": 1, "eos_token_id": 2}


def sentences(count: int) -> dict[str, Tensor]:
    """Return sentences of unequal length, padded, to be continued."""
    words = torch.randint(3, WORDS, (count, LENGTH))
    mask = torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (count, 1))
    return {
        "input_ids": words,
        "attention_mask": mask.long(),
        "labels": words.masked_fill(~mask, -100),
    }


def classified(count: int) -> dict[str, Tensor]:
    return {**sentences(count), "labels": torch.randint(CLASSES, (count,))}


def tagged(count: int) -> dict[str, Tensor]:
    batch = sentences(count)
    tags = torch.randint(CLASSES, batch["labels"].shape)
    return {**batch, "labels": torch.where(batch["labels"] < 0, -100, tags)}


def translated(count: int) -> dict[str, Tensor]:
    labels = torch.randint(3, WORDS, (count, 6))
    labels[0, 4:] = -100
    return {**sentences(count), "labels": labels}


def pictures(count: int) -> dict[str, Tensor]:
    images = torch.randn(count, 3, 8, 8)
    return {"pixel_values": images, "labels": torch.randint(CLASSES, (count,))}


ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str, Callable[[int], dict[str, Tensor]]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {**GPT2, **END}, "causal-lm", sentences),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED, "causal-lm", sentences),
    "Qwen3ForCausalLM": ("Qwen3Config", {**GROUPED, "head_dim": 4}, "causal-lm", sentences),
    "Gemma2ForCausalLM": ("Gemma2Config", {**GROUPED, "head_dim": 4}, "causal-lm", sentences),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL, "causal-lm", sentences),
    "MambaForCausalLM": (
        "MambaConfig",
        {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, **END},
        "causal-lm",
        sentences,
    ),
    "BertForSequenceClassification": (
        "BertConfig",
        {**SMALL, "num_labels": CLASSES},
        "cross-entropy",
        classified,
    ),
    "BertForMaskedLM": ("BertConfig", SMALL, "token-cross-entropy", sentences),
    "RobertaForTokenClassification": (
        "RobertaConfig",
        {**SMALL, "num_labels": CLASSES},
        "token-cross-entropy",
        tagged,
    ),
    "T5ForConditionalGeneration": ("T5Config", T5, "token-cross-entropy", translated),
    "BartForConditionalGeneration": ("BartConfig", BART, "token-cross-entropy", translated),
    "ViTForImageClassification": ("ViTConfig", VISION, "cross-entropy", pictures),
}


def model_of(name: str) -> nn.Module:
    """Return a model far from linear."""
    config, options, _, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model.eval().double()


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss that the model computes of labels, times the labels that it is a mean of."""
    labels = batch["labels"]
    total: Tensor = model(**batch).loss
    shifted = (
        labels[:, 1:] if type(model).__name__.endswith(("CausalLM", "LMHeadModel")) else labels
    )
    return total.reshape(1) * (shifted != -100).sum()


def rows_of(loss: Any, model: nn.Module, batch: dict[str, Tensor], task: dattri.Task) -> Tensor:
    gradients = loop_gradients(model, loss, batch)
    return torch.cat([gradients[name].flatten(1) for name in task.parameter_names], 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_the_loss_of_the_model_itself(name: str) -> None:
    _, _, loss, data = ARCHITECTURES[name]
    model = model_of(name)
    torch.manual_seed(1)
    train, test = data(7), data(2)
    if "pixel_values" in train:
        train, test = (
            {**batch, "pixel_values": batch["pixel_values"].double()} for batch in (train, test)
        )
    task = dattri.Task(model, loss=loss)
    want = rows_of(own_loss, model, train, task) @ rows_of(own_loss, model, test, task).T
    # The loss of a causal model of theirs, and the scan of Mamba, are in single precision.
    loose = 1e-5 if loss == "causal-lm" else 1e-10
    for source in ("per-example", "functional"):
        scores = dattri.attribute(task, train, test, method="grad-dot", source=source)
        torch.testing.assert_close(
            torch.as_tensor(scores.values), want, rtol=0, atol=loose * float(want.abs().max())
        )
    for method in ("if-ekfac", "logra"):
        scores = dattri.attribute(task, train, test, method=method)
        assert torch.isfinite(torch.as_tensor(scores.values)).all()


def test_adapters_of_peft_are_attributed_alone() -> None:
    peft = pytest.importorskip("peft")
    base = model_of("LlamaForCausalLM")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, config).eval().double()
    torch.manual_seed(1)
    train, test = sentences(6), sentences(2)
    task = dattri.Task(model, loss="causal-lm")
    assert all("lora_" in name for name in task.parameter_names)
    loss = dattri.causal_lm
    want = rows_of(loss, model, train, task) @ rows_of(loss, model, test, task).T
    scores = dattri.attribute(task, train, test, method="grad-dot")
    torch.testing.assert_close(torch.as_tensor(scores.values), want, rtol=1e-10, atol=1e-12)


def test_a_model_that_counts_its_tokens_is_read_in_turn(caplog: Any) -> None:
    """T5 branches on values, which ``vmap`` refuses."""
    model = model_of("T5ForConditionalGeneration")
    task = dattri.Task(model, loss="token-cross-entropy", parameters="*.q.weight")
    torch.manual_seed(1)
    with caplog.at_level(logging.INFO, logger="dattri"):
        method = dattri.method("grad-dot", source="functional")
        method.attribute(task, translated(3), translated(1))
    assert any("one example after another" in record.getMessage() for record in caplog.records)
