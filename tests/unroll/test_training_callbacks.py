"""Callbacks that record the runs of trainers, driven as the trainers drive them."""

import sys
import types
from collections import namedtuple

import pytest
import torch
from dattri_unroll import hugging_face_callback, lightning_callback, read_run
from recorded import LOSSES, N, network, run_recorded, schedule
from torch import nn

import dattri_core as dattri


class Wrapped(nn.Module):
    """A network whose forward takes named arguments, as those of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.net = network()[0]

    def forward(self, inputs, labels):
        return LOSSES["cross-entropy"](self.net(inputs), labels).mean()


def same_run(folder, other):
    """Assert that two folders hold the same steps from the same weights."""
    left, right = read_run(folder), read_run(other)
    assert len(left) == len(right) == 10
    for one, two in zip(left, right, strict=True):
        assert one.step.batch.tolist() == two.step.batch.tolist()
        assert one.step.epoch == two.step.epoch
        assert one.learning_rate == two.learning_rate
        states = [checkpoint.source for checkpoint in (one, two)]
        weights = [torch.cat([t.flatten() for t in load(path).values()]) for path in states]
        assert torch.equal(*weights)


def load(path):
    from safetensors.torch import load_file

    return dict(sorted(load_file(path).items()))


@pytest.fixture
def recorded(tmp_path):
    run_recorded(network(), tmp_path / "want")
    return tmp_path / "want"


# --- Hugging Face ---------------------------------------------------------------------------------
Arguments = namedtuple("Arguments", "max_grad_norm gradient_accumulation_steps world_size")
State = namedtuple("State", "epoch")


@pytest.fixture
def transformers(monkeypatch):
    module = types.ModuleType("transformers")
    module.TrainerCallback = type("TrainerCallback", (), {})
    monkeypatch.setitem(sys.modules, "transformers", module)


def hugging_face_training(callback, arguments=None, column="index"):
    """Train as ``transformers.Trainer`` does."""
    arguments = arguments or Arguments(0.0, 1, 1)
    model, (_, _, data, _) = Wrapped(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accelerated = types.SimpleNamespace(optimizer=optimizer)
    given = {"model": model, "optimizer": accelerated}
    state = State(0.0)
    callback.on_train_begin(arguments, state, None, **given)
    for step, (indices, rate) in enumerate(zip(*schedule(), strict=True)):
        optimizer.param_groups[0]["lr"] = rate
        batch = {"inputs": data[0][indices], "labels": data[1][indices]}
        batch[column] = torch.tensor(indices)
        model.train()
        optimizer.zero_grad()
        model(**batch).backward()
        callback.on_pre_optimizer_step(arguments, state, None, **given)
        optimizer.step()
        model.eval()
        model(**(batch | {"index": torch.zeros(4)}))  # an evaluation between two steps
        state = State((step + 1) / 3)
    callback.on_train_end(arguments, state, None, **given)
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_run_of_the_hugging_face_trainer_is_recorded(transformers, recorded, tmp_path):
    hugging_face_training(hugging_face_callback(tmp_path / "run"))
    same_run(tmp_path / "run", recorded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (Arguments(0.0, 2, 1), r"\{'gradient_accumulation_steps': 2\}"),
        (Arguments(0.0, 1, 4), r"\{'world_size': 4\}"),
    ],
)
def test_other_steps_of_the_hugging_face_trainer_are_refused(
    transformers, arguments, message, tmp_path
):
    with pytest.raises(dattri.InputError, match=message):
        hugging_face_training(hugging_face_callback(tmp_path / "run"), arguments)


def test_batches_without_positions_are_refused(transformers, tmp_path):
    callback = hugging_face_callback(tmp_path / "run", column="place")
    model, (_, _, data, _) = Wrapped(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = {"model": model, "optimizer": optimizer}
    callback.on_train_begin(Arguments(0.0, 1, 1), State(0.0), None, **given)
    model(inputs=data[0], labels=data[1]).backward()
    with pytest.raises(dattri.InputError, match="no column 'place' of positions"):
        callback.on_pre_optimizer_step(None, State(0.0), None, **given)


# --- Lightning ------------------------------------------------------------------------------------
@pytest.fixture(params=["lightning", "pytorch_lightning"])
def lightning(request, monkeypatch):
    module = types.ModuleType(request.param)
    module.Callback = type("Callback", (), {})
    for name in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, module if name == request.param else None)


def lightning_training(callback, stop=None, **changes):
    """Train as ``lightning.Trainer`` does."""
    model, _, data, _ = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plain = {"accumulate_grad_batches": 1, "world_size": 1, "gradient_clip_val": None}
    settings = {**plain, "optimizers": [optimizer], **changes}
    trainer = types.SimpleNamespace(**settings)
    callback.on_train_start(trainer, model)
    for step, (indices, rate) in enumerate(zip(*schedule(), strict=True)):
        trainer.current_epoch = step * 4 // N
        optimizer.param_groups[0]["lr"] = rate
        batch = {"index": torch.tensor(indices), "x": data[0][indices], "y": data[1][indices]}
        callback.on_train_batch_start(trainer, model, batch, step % 3)

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = LOSSES["cross-entropy"](model(batch["x"]), batch["y"]).mean()
            loss.backward()
            callback.on_before_optimizer_step(trainer, model, optimizer)
            return loss

        if step == stop:
            callback.on_exception(trainer, model, RuntimeError())
            return optimizer
        optimizer.step(closure)
    callback.on_train_end(trainer, model)
    return optimizer


def test_a_run_of_lightning_is_recorded(lightning, recorded, tmp_path):
    callback = lightning_callback(tmp_path / "run", lambda batch: batch["index"])
    optimizer = lightning_training(callback)
    same_run(tmp_path / "run", recorded)
    assert not optimizer._optimizer_step_post_hooks


def test_a_run_of_lightning_that_failed_is_not_whole(lightning, tmp_path):
    callback = lightning_callback(tmp_path / "run", lambda batch: batch["index"])
    optimizer = lightning_training(callback, stop=4)
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(dattri.InputError, match="it was stopped after 4 steps"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate_grad_batches": 2}, r"\{'accumulate_grad_batches': 2\}"),
        (
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            r"\{'gradient_clip_algorithm': 'value'\}",
        ),
        ({"world_size": 2}, r"\{'world_size': 2\}"),
        ({"optimizers": []}, "0 optimisers"),
    ],
)
def test_other_steps_of_lightning_are_refused(lightning, changes, message, tmp_path):
    callback = lightning_callback(tmp_path / "run", lambda batch: batch["index"])
    with pytest.raises(dattri.InputError, match=message):
        lightning_training(callback, **changes)


# --- neither is installed -------------------------------------------------------------------------
def test_a_trainer_that_is_not_installed_is_named(monkeypatch, tmp_path):
    for name in ("transformers", "lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(dattri.InputError, match="transformers is not installed"):
        hugging_face_callback(tmp_path)
    with pytest.raises(dattri.InputError, match="Lightning is not installed"):
        lightning_callback(tmp_path, lambda batch: batch)
