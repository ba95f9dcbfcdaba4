"""Checkpoints: what loads, what is refused, and that no pickle runs."""

import io
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dattri_core import InputError, StoreError, Task
from dattri_core.checkpoint import (
    Checkpoint,
    TrainingStep,
    checkpoints_of,
    own_tensors,
    state_fingerprint,
)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


def same(left, right):
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def load(source, net):
    (checkpoint,) = checkpoints_of(source, None)
    return checkpoint.load(net)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "bin", "ckpt"])
def test_every_format_gives_the_tensors_back(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    saved = model(1).state_dict()
    save_file(saved, path) if suffix == "safetensors" else torch.save(saved, path)
    for source in (path, str(path), str(tmp_path / "a.*"), tmp_path, [path]):
        same(load(source, model(2)), saved)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_training_checkpoint_is_opened(tmp_path, key):
    saved = model(1).state_dict()
    torch.save({key: saved, "epoch": 3}, tmp_path / "a.pt")
    same(load(tmp_path / "a.pt", model(2)), saved)


def test_a_folder_a_pattern_and_a_list_keep_their_order(tmp_path):
    for step in (9, 10, 100, 1):
        save_file(model(step).state_dict(), tmp_path / f"step-{step}.safetensors")
    (tmp_path / "notes.txt").write_text("no checkpoint")
    want = [f"step-{step}.safetensors" for step in (1, 9, 10, 100)]
    for source in (tmp_path, str(tmp_path / "step-*.safetensors")):
        found = checkpoints_of(source, [0.4, 0.3, 0.2, 0.1])
        assert [c.name for c in found] == want
        assert [c.position for c in found] == [0, 1, 2, 3]
        assert {c.count for c in found} == {4}
        assert [c.learning_rate for c in found] == [0.4, 0.3, 0.2, 0.1]
    listed = [tmp_path / name for name in reversed(want)]
    assert [c.name for c in checkpoints_of(listed, None)] == want[::-1]


@pytest.mark.parametrize("kind", [tuple, torch.tensor, np.array])
def test_learning_rates_may_be_an_array(kind):
    found = checkpoints_of([model().state_dict()] * 2, kind([0.5, 0.25]))
    assert [c.learning_rate for c in found] == [0.5, 0.25]
    assert {type(c.learning_rate) for c in found} == {float}


def test_checkpoints_are_taken_as_they_are_at_their_places():
    step = TrainingStep(torch.tensor([1, 0]), 0.1, 2)
    state = model().state_dict()
    given = [
        Checkpoint(name, 7, 9, rate, state, step=s)
        for name, rate, s in (("a", 0.5, step), ("b", None, None))
    ]
    found = Task(model(), checkpoints=given).checkpoints
    assert [(c.name, c.position, c.count, c.learning_rate) for c in found] == [
        ("a", 0, 2, 0.5),
        ("b", 1, 2, None),
    ]
    assert [c.step for c in found] == [step, None]
    with pytest.raises(InputError, match="have their own; leave learning_rates= out"):
        checkpoints_of(given, [0.1, 0.2])
    with pytest.raises(InputError, match=r"or a list of dattri\.Checkpoint alone"):
        checkpoints_of([given[0], state], None)


def test_keys_that_do_not_fit_are_named():
    state = model().state_dict()
    state["extra.weight"] = torch.zeros(1)
    del state["1.running_mean"], state["2.bias"]
    with pytest.raises(InputError) as caught:
        load(state, model())
    text = str(caught.value)
    assert "missing ['2.bias', '1.running_mean']" in text
    assert "unexpected ['extra.weight']" in text
    state = model().state_dict()
    state["2.bias"] = torch.zeros(3)
    with pytest.raises(InputError, match=r"'2.bias' has shape \(3,\), the model's has \(2,\)"):
        load(state, model())
    wrapped = {f"module.{k}": v for k, v in model().state_dict().items()}
    with pytest.raises(InputError, match="unwrapped"):
        load(wrapped, model())


@pytest.mark.parametrize("kept", [["embedding.weight"], ["head.weight"], None])
def test_tied_weights_load_under_any_of_their_names(kept):
    source, net = Tied(), Tied()
    state = source.state_dict()
    state = {k: v for k, v in state.items() if kept is None or k in kept}
    loaded = load(state, net)
    same(loaded, {"embedding.weight": source.embedding.weight})
    assert set(own_tensors(net)) == {"embedding.weight"}


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("writer", ["pickle", "torch", "nested"])
def test_a_pickle_of_code_is_refused_and_never_runs(tmp_path, writer):
    trace = tmp_path / "it-ran"
    path = tmp_path / "a.pt"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Malicious(trace)))
    else:
        state = dict(model().state_dict())
        torch.save(
            Malicious(trace) if writer == "torch" else {**state, "x": Malicious(trace)}, path
        )
    with pytest.raises(StoreError, match="cannot be read as tensors only"):
        load(path, model())
    assert not trace.exists()
    buffer = io.BytesIO(path.read_bytes())  # the file does what it claims when it is trusted
    if writer == "pickle":
        pickle.load(buffer).close()
        assert trace.exists()


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(model(), tmp_path / "a.pt")
    with pytest.raises(StoreError, match=r"a\.pt.*save_file"):
        load(tmp_path / "a.pt", model())


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("keep", [0, 7, 50, -1])
def test_a_truncated_file_is_refused(tmp_path, suffix, keep):
    path = tmp_path / f"a.{suffix}"
    saved = model().state_dict()
    save_file(saved, path) if suffix == "safetensors" else torch.save(saved, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=rf"a\.{suffix}"):
        load(path, model())


def test_a_foreign_file_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "a.pt")
    with pytest.raises(StoreError, match="holds a list"):
        load(tmp_path / "a.pt", model())
    torch.save({"weight": torch.zeros(2), "epoch": 3}, tmp_path / "b.pt")
    with pytest.raises(StoreError, match="expected names and tensors"):
        load(tmp_path / "b.pt", model())


@pytest.mark.parametrize(
    ("source", "rates", "message"),
    [
        ("nothing/*.safetensors", None, "'nothing/\\*.safetensors' names no file"),
        (nn.Linear(1, 1), None, "got a Linear"),
        ([], None, "empty list"),
        ({"weight": torch.zeros(1), "epoch": 3}, None, r"no tensors: \['epoch'\]"),
        (None, [0.1, 0.2], "got 2 for 1 checkpoints"),
    ],
)
def test_bad_sources_are_refused(source, rates, message):
    with pytest.raises(InputError, match=message):
        checkpoints_of(source, rates)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="names no file"):
        checkpoints_of(tmp_path, None)


def test_a_file_that_is_gone_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(model().state_dict(), path)
    (checkpoint,) = checkpoints_of(path, None)
    path.unlink()
    with pytest.raises((InputError, StoreError), match=r"a\.safetensors"):
        checkpoint.load(model())


def test_no_checkpoint_means_the_weights_as_they_are_when_loaded():
    net = model(0)
    task = Task(net)
    with torch.no_grad():
        net[0].weight.add_(1)
    loaded = task.checkpoints[0].load(net)
    same(loaded, {k: v.detach() for k, v in own_tensors(net).items()})
    assert not any(t.requires_grad for t in loaded.values())


def test_a_state_dict_is_copied_when_it_is_given():
    net = model(0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    task = Task(net, checkpoints=[net.state_dict(), net.state_dict()])
    with torch.no_grad():
        net[0].weight.add_(1)
    for checkpoint in task.checkpoints:
        same(checkpoint.load(net), before)


def test_dtype_and_device_are_the_models():
    state = {k: v.double() for k, v in model(1).state_dict().items()}
    loaded = load(state, model(2))
    assert {k: t.dtype for k, t in loaded.items()} == {
        k: t.dtype for k, t in own_tensors(model(2)).items()
    }


def test_fingerprints_tell_states_apart():
    base = dict(model(0).state_dict())
    changed = {k: v.clone() for k, v in base.items()}
    changed["0.bias"][0] = torch.nextafter(changed["0.bias"][0], torch.tensor(9.0))
    renamed = {("x" + k): v for k, v in base.items()}
    cast = {k: v.double() if v.is_floating_point() else v for k, v in base.items()}
    prints = [state_fingerprint(s) for s in (base, changed, renamed, cast)]
    assert len(set(prints)) == 4
    assert state_fingerprint(dict(reversed(list(base.items())))) == prints[0]
