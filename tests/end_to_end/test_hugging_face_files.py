"""What Hugging Face's trainer and PEFT write to disk, given to a task as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dattri_core as dattri
from dattri_core import InputError, Task
from dattri_core.checkpoint import checkpoints_of

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 20, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
END = {"bos_token_id": 0, "eos_token_id": 1}


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **END)).eval()


def words(count: int, seed: int = 5) -> dict[str, Tensor]:
    made = torch.randint(2, 20, (count, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": made, "labels": made.clone()}


def scores(model: nn.Module, checkpoints: Any, **options: Any) -> Tensor:
    task = Task(model, loss="causal-lm", checkpoints=checkpoints, **options)
    method = "tracin" if "learning_rates" in options else "grad-dot"
    return torch.as_tensor(dattri.attribute(task, words(6), words(2, 6), method=method).values)


def test_checkpoints_of_a_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    states: list[dict[str, Tensor]] = []

    class Keep(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        def on_save(self, *_: Any, model: nn.Module, **__: Any) -> None:
            states.append({name: t.detach().clone() for name, t in model.state_dict().items()})

    data = words(8)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"),
        num_train_epochs=3,
        per_device_train_batch_size=2,
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    rows = [{name: t[i] for name, t in data.items()} for i in range(8)]
    model = gpt2()
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Keep()]).train()
    names = ["checkpoint-4", "checkpoint-8", "checkpoint-12"]  # not in the order of letters
    rates = {"learning_rates": [0.3, 0.2, 0.1]}
    want = scores(model, states, **rates)
    for given in (
        tmp_path / "out",
        str(tmp_path / "out" / "checkpoint-*"),
        [tmp_path / "out" / name for name in names],
    ):
        assert [c.name for c in checkpoints_of(given, None)] == names
        assert torch.equal(scores(model, given, **rates), want)


def test_a_model_that_was_saved_in_shards(tmp_path: Path) -> None:
    saved = gpt2(1)
    saved.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(scores(gpt2(2), tmp_path), scores(saved, None))


# --- adapters -------------------------------------------------------------------------------------
def adapted(seed: int, **options: Any) -> Any:
    """Return an adapter of its own on the same base."""
    peft = pytest.importorskip("peft")
    given = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, **options}
    config = peft.LoraConfig(init_lora_weights=False, **given)
    base = gpt2(0)
    torch.manual_seed(seed)
    return peft.get_peft_model(base, config).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["ln_f"]},
        {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": False},
    ],
    ids=["lora", "dora", "a whole module", "embeddings"],
)
def test_an_adapter_goes_onto_the_base_of_the_model(options: Any, tmp_path: Path) -> None:
    import peft

    saved, other = adapted(1, **options), adapted(2, **options)
    saved.save_pretrained(tmp_path / "adapter")
    want = scores(saved, None)
    assert not torch.allclose(scores(other, None), want, rtol=1e-3)
    for given in (
        tmp_path / "adapter",
        tmp_path / "adapter" / "adapter_model.safetensors",
        [peft.get_peft_model_state_dict(saved)],
        [saved.state_dict()],
    ):
        assert torch.equal(scores(other, given), want)


def test_an_adapter_with_a_weight_missing_or_too_many_is_refused() -> None:
    import peft

    model = adapted(1)
    state = peft.get_peft_model_state_dict(model)
    first, *rest = state
    for given, message in (
        ({name: state[name] for name in rest}, "missing"),
        ({**state, "base_model.model.other.lora_A.weight": state[first]}, "unexpected"),
        ({**state, first: state[first][:1]}, "has shape"),
        ({n: t for n, t in model.state_dict().items() if "wpe" not in n}, "missing.*wpe"),
    ):
        with pytest.raises(InputError, match=message):
            scores(model, [given])


def test_an_adapter_of_other_settings_is_refused(tmp_path: Path) -> None:
    adapted(1, lora_alpha=16).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="lora_alpha is 16 there, 8 in the model"):
        scores(adapted(1, lora_alpha=8), tmp_path)


def test_the_fingerprint_of_an_adapter_is_that_of_its_base_too(tmp_path: Path) -> None:
    model = adapted(1)
    model.save_pretrained(tmp_path)
    (checkpoint,) = checkpoints_of(tmp_path, None)
    before = checkpoint.fingerprint(model)
    with torch.no_grad():
        model.base_model.model.transformer.wte.weight[0, 0] += 1
    assert checkpoint.fingerprint(model) != before


def test_an_adapter_for_a_model_without_one_is_refused(tmp_path: Path) -> None:
    adapted(1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="give the task the PeftModel"):
        scores(gpt2(), tmp_path)
