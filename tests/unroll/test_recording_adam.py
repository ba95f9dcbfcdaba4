"""The recorder in a training by Adam: the moments it writes, and how a stopped run goes on."""

import pytest
import torch
from dattri_unroll import read_run, record
from dattri_unroll.moments_file import moments_file
from dattri_unroll.run_folder import step_file
from recorded import LOSSES, groups_of, network, schedule, train_step
from safetensors.torch import load_file
from torch import nn

import dattri_core as dattri

DECAYS = {"0.weight": 0.2, "0.bias": 0.0, "2.weight": 0.1, "2.bias": 0.0}


class StoppedError(Exception):
    """The training stops here."""


def adam(model):
    return torch.optim.AdamW(groups_of(model, DECAYS), lr=0.05, betas=(0.8, 0.95), eps=1e-3)


def train(model, folder, *, stop=None, state=None, seen=None, steps=6):
    """Record steps from where the folder is; keep the optimiser's moments before each."""
    optimizer = adam(model)
    if state is not None:
        optimizer.load_state_dict(state)
    batches = schedule(steps)[0]
    with record(model, optimizer, folder, clip=2.0) as run:
        for step in range(run.position, steps):
            train_step(model, optimizer, LOSSES["cross-entropy"], network()[2], batches[step])
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            run.step(batches[step])
            if seen is not None:
                seen.append(moments_of(model, optimizer))
            if step == stop:
                raise StoppedError(optimizer.state_dict())
            optimizer.step()
        if seen is not None:
            seen.append(moments_of(model, optimizer))


def moments_of(model, optimizer):
    held = {n: optimizer.state.get(p, {}) for n, p in model.named_parameters()}
    return {
        n: (int(s["step"]), s["exp_avg"].clone(), s["exp_avg_sq"].clone())
        for n, s in held.items()
        if s
    }


def same(left, right):
    return left.keys() == right.keys() and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
        for a, b in ((left[n], right[n]) for n in left)
    )


def read(checkpoint, model):
    if checkpoint.optimiser is None:
        return {}
    found = checkpoint.optimiser.load(model)
    return {n: (own.step, own.first, own.second) for n, own in found.items()}


def test_the_moments_before_every_step_and_at_the_end_are_written(tmp_path):
    model, seen = network()[0], []
    train(model, tmp_path, seen=seen)
    checkpoints = read_run(tmp_path)
    assert len(checkpoints) == len(seen) == 7
    assert checkpoints[0].optimiser is None
    for checkpoint, moments in zip(checkpoints, seen, strict=True):
        assert same(read(checkpoint, model), moments)
        assert checkpoint.step.adam == dattri.AdamRule((0.8, 0.95), 1e-3, decoupled=True)
        assert checkpoint.step.clip == 2.0
    assert checkpoints[3].step.weight_decay == DECAYS
    assert checkpoints[3].step.decay_of("2.weight") == 0.1


def test_adam_with_weight_decay_that_is_not_decoupled(tmp_path):
    model = network()[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.3)
    with record(model, optimizer, tmp_path) as run:
        train_step(model, optimizer, LOSSES["cross-entropy"], network()[2], [0, 1])
        run.step([0, 1])
        optimizer.step()
    step = read_run(tmp_path)[0].step
    assert step.adam == dattri.AdamRule((0.9, 0.999), 1e-8, decoupled=False)
    assert step.weight_decay == 0.3


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), float("nan")])
def test_a_norm_to_clip_to_that_is_none_is_refused(clip, tmp_path):
    model = network()[0]
    with (
        pytest.raises(dattri.InputError, match=r"clip is .*; give the largest norm"),
        record(model, adam(model), tmp_path / "run", clip=clip),
    ):
        pass


def test_a_stopped_run_goes_on_with_the_state_of_the_optimiser(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(network()[0], whole)
    model = network()[0]
    with pytest.raises(StoppedError) as raised:
        train(model, stopped, stop=3)
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    with pytest.raises(dattri.InputError, match=r"the optimiser has other moments .* load its st"):
        train(model, stopped)
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before
    train(model, stopped, state=raised.value.args[0])
    for left, right in zip(read_run(whole), read_run(stopped), strict=True):
        assert same(read(left, model), read(right, model))
        assert torch.equal(left.load(model)["0.weight"], right.load(model)["0.weight"])


def test_a_run_goes_on_at_its_beginning_without_moments(tmp_path):
    model, seen = network()[0], []
    with pytest.raises(StoppedError):
        train(model, tmp_path, stop=4)
    model.load_state_dict(load_file(step_file(tmp_path, 0)))
    moments_file(tmp_path, 5).write_bytes(b"of a step that a kill left unwritten")
    with pytest.raises(StoppedError):
        train(model, tmp_path, stop=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000000.safetensors",
        "step-00000001.moments.pt",
        "step-00000001.safetensors",
    ]
    model.load_state_dict(load_file(step_file(tmp_path, 0)))
    train(model, tmp_path, seen=seen)
    for checkpoint, moments in zip(read_run(tmp_path), seen, strict=True):
        assert same(read(checkpoint, model), moments)


@pytest.mark.parametrize(("what", "factor"), [("exp_avg_sq", 1.001), ("exp_avg", -1), ("step", 2)])
def test_other_moments_of_one_parameter_are_refused(what, factor, tmp_path):
    model = network()[0]
    with pytest.raises(StoppedError) as raised:
        train(model, tmp_path, stop=3)
    state = raised.value.args[0]
    state["state"][2][what] *= factor
    with pytest.raises(dattri.InputError, match=r"other moments than .* of \['2.weight'\]"):
        train(model, tmp_path, state=state)


def test_missing_or_changed_moments_are_refused(tmp_path):
    train(network()[0], tmp_path)
    path = moments_file(tmp_path, 4)
    content = path.read_bytes()
    path.unlink()
    for verify in (True, False):
        with pytest.raises(dattri.StoreError, match="moments of Adam before step 4 are missing"):
            read_run(tmp_path, verify=verify)
    path.write_bytes(content[:-40] + bytes(40))
    with pytest.raises(dattri.StoreError, match=r"moments\.pt.* does not match its hash"):
        read_run(tmp_path)
    path.write_bytes(content)
    read_run(tmp_path)
    moments_file(tmp_path, 3).write_bytes(content)
    with pytest.raises(dattri.StoreError, match=r"00003\.moments\.pt.* does not match its hash"):
        read_run(tmp_path)


def test_less_reads_the_moments_of_a_recorded_run(tmp_path):
    model, loss, data, test = network()
    train(model, tmp_path)
    task = dattri.Task(model, loss, checkpoints=read_run(tmp_path)[1:-1])
    scores = dattri.attribute(task, data, test, method="less", dim=16, progress=False)
    assert scores.values.shape == (12, 4)
    assert bool(scores.values.abs().gt(0).all())
