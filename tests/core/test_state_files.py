"""Files of weights as trainers leave them: folders, shards with an index, what lies beside them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dattri_core import InputError, StoreError, Task
from dattri_core.checkpoint import checkpoints_of


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def same(left, right):
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def trained(folder, seed):
    """Write what a trainer does; every file beside the weights would be refused if it were read."""
    folder.mkdir(parents=True)
    state = model(seed).state_dict()
    save_file(state, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt"):
        (folder / name).write_bytes(b"not weights")
    (folder / "training_args.bin").write_bytes(b"not weights")
    (folder / "trainer_state.json").write_text("{}")
    return state


def sharded(folder, suffix="safetensors"):
    folder.mkdir(parents=True)
    state = model(7).state_dict()
    whole = "model" if suffix == "safetensors" else "pytorch_model"
    places = {name: f"{whole}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(state)}
    for file in set(places.values()):
        part = {name: t for name, t in state.items() if places[name] == file}
        save = save_file if suffix == "safetensors" else torch.save
        save(part, folder / file)
    index = folder / f"{whole}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return state, index


GIVEN = {
    "a pattern": lambda out: str(out / "checkpoint-*"),
    "the folder above": lambda out: out,
    "a list": lambda out: [out / f"checkpoint-{step}" for step in (2, 10, 100)],
    "files": lambda out: str(out / "checkpoint-*" / "model.safetensors"),
}


@pytest.mark.parametrize("given", GIVEN)
def test_folders_of_a_trainer_are_checkpoints_in_the_order_of_their_steps(given, tmp_path):
    states = {step: trained(tmp_path / f"checkpoint-{step}", step) for step in (10, 2, 100)}
    (tmp_path / "runs").mkdir()
    task = Task(model(), checkpoints=GIVEN[given](tmp_path), learning_rates=[0.1, 0.2, 0.3])
    names = [f"checkpoint-{step}" for step in (2, 10, 100)]
    if given == "files":
        names = ["model.safetensors"] * 3
    assert [c.name for c in task.checkpoints] == names
    for checkpoint, step in zip(task.checkpoints, (2, 10, 100), strict=True):
        same(checkpoint.load(task.model), states[step])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_with_an_index_are_one_checkpoint(suffix, tmp_path):
    state, index = sharded(tmp_path / "out", suffix)
    for given in (tmp_path / "out", [tmp_path / "out"], index):
        (checkpoint,) = checkpoints_of(given, None)
        checkpoint.check(model())
        same(checkpoint.load(model()), state)
    assert checkpoints_of(tmp_path / "out", None)[0].name == "out"


def test_the_fingerprint_of_shards_is_that_of_every_one(tmp_path):
    _, index = sharded(tmp_path / "out")
    (checkpoint,) = checkpoints_of(index, None)
    first, prints = checkpoint.fingerprint(model()), set()
    for file in sorted(tmp_path.glob("out/*.safetensors")):
        before = bytearray(file.read_bytes())
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        prints.add(checkpoint.fingerprint(model()))
        file.write_bytes(before)
    assert len(prints) == 2
    assert first not in prints
    assert checkpoint.fingerprint(model()) == first


def broken(index, how):
    found = json.loads(index.read_text())
    names = sorted(found["weight_map"])
    shard = index.parent / found["weight_map"][names[0]]
    if how == "a shard is gone":
        shard.unlink()
    elif how == "a name is elsewhere":
        places = found["weight_map"]
        other = next(file for file in places.values() if file != places[names[0]])
        places[names[0]] = other
    elif how == "a name is not listed":
        del found["weight_map"][names[0]]
    elif how == "another folder":
        found["weight_map"][names[0]] = f"../{shard.name}"
    elif how == "no map":
        del found["weight_map"]
    index.write_text("{" if how == "truncated" else json.dumps(found))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a shard is gone", r"names \['model-0000\d-of-00002.safetensors'\], which are missing"),
        ("a name is elsewhere", "different saves"),
        ("a name is not listed", "different saves"),
        ("another folder", "index cannot be read"),
        ("no map", "index cannot be read"),
        ("truncated", "index cannot be read"),
    ],
)
def test_an_index_that_its_shards_do_not_fit_is_refused(how, message, tmp_path):
    _, index = sharded(tmp_path / "out")
    broken(index, how)
    (checkpoint,) = checkpoints_of(index, None)
    with pytest.raises(StoreError, match=message):
        checkpoint.check(model())
    with pytest.raises(StoreError, match=message):
        checkpoint.load(model())


def test_weights_that_are_missing_are_missing_in_a_folder_too(tmp_path):
    folder = tmp_path / "checkpoint-1"
    state = trained(folder, 1)
    del state["1.bias"]
    save_file(state, folder / "model.safetensors")
    (checkpoint,) = checkpoints_of(folder, None)
    with pytest.raises(InputError, match=r"'checkpoint-1' does not fit.*missing \['1.bias'\]"):
        checkpoint.check(model())


def test_a_folder_with_files_of_ones_own_beside_the_weights_is_all_of_them(tmp_path):
    trained(tmp_path / "out", 1)
    for step in (9, 10):
        save_file(model(step).state_dict(), tmp_path / "out" / f"epoch-{step}.safetensors")
    names = [c.name for c in checkpoints_of(tmp_path / "out", None)]
    assert names == ["epoch-9.safetensors", "epoch-10.safetensors", "model.safetensors"]


def test_what_is_named_otherwise_is_refused_with_what_was_looked_for(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"names no file.*no folder with model.safetensors"):
        checkpoints_of(tmp_path, None)


def test_a_folder_with_a_model_and_an_adapter_is_refused(tmp_path):
    state = trained(tmp_path / "out", 1)
    save_file(state, tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"holds both model.safetensors and adapter_model"):
        checkpoints_of(tmp_path / "out", None)


def test_an_adapter_needs_its_model(tmp_path):
    key = "base_model.model.0.lora_A.weight"
    with pytest.raises(InputError, match=r"missing \['0.weight'.*give the task the PeftModel"):
        Task(model(), checkpoints=[{key: torch.ones(1, 3)}]).checkpoints[0].check(model())
