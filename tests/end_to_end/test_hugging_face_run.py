"""A whole run of Hugging Face's trainer, as it trains by default, recorded and differentiated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dattri_parts.training import leave_one_out
from dattri_unroll import RunRetraining, hugging_face_callback, read_run

import dattri_core as dattri

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
N, LENGTH = 16, 8
SIZES = {"vocab_size": 20, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def words(count: int, seed: int) -> torch.Tensor:
    return torch.randint(2, 20, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


def test_a_language_model_by_adamw_with_clipping_and_decay_by_group(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES, **STILL, bos_token_id=0, eos_token_id=1)
    model = transformers.GPT2LMHeadModel(config)
    train, test = words(N, 5), words(3, 6)
    rows = [{"input_ids": train[i], "labels": train[i], "index": torch.tensor(i)} for i in range(N)]

    def scale(batch: Any) -> float:
        """The trainer divides the sum over tokens by the number of labels, the first ones too."""
        return len(batch["labels"]) / int(batch["labels"].ne(-100).sum())

    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"),
        num_train_epochs=6,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        weight_decay=0.1,
        adam_epsilon=1e-2,
        max_grad_norm=0.5,
        warmup_steps=3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    recorder = hugging_face_callback(tmp_path / "run", scale=scale)
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[recorder]).train()
    run = read_run(tmp_path / "run")
    assert len(run) == 13
    assert isinstance(run[0].step.weight_decay, dict)
    assert set(run[0].step.weight_decay.values()) == {0.0, 0.1}
    model.eval()
    sides = [{"input_ids": side, "labels": side} for side in (train, test)]
    task = dattri.Task(model, "causal-lm", checkpoints=run)
    scores = dattri.attribute(task, *sides, method="magic", progress=False)  # steps are compared
    again = RunRetraining(task, *sides, targets=("loss",))
    whole, *others = again.train([dattri.Counterfactual(np.ones(N, dtype=bool)), *leave_one_out(N)])
    end = run[-1].load(model)
    assert max(float((whole[name] - end[name]).abs().max()) for name in whole if name in end) < 1e-5
    before = again.measure(whole)["loss"]
    change = np.stack([again.measure(state)["loss"] - before for state in others])
    effect = scores.removal_effect().numpy()
    assert np.corrcoef(change.ravel(), effect.ravel())[0, 1] > 0.95
    assert 0.6 < (effect * change).sum() / (change * change).sum() < 1.5  # in size too
