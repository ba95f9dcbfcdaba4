"""The recorder: what it writes, what it refuses, and how a run that was stopped goes on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dattri_unroll import read_run, record
from dattri_unroll.run_folder import read_facts, read_weights, step_file
from recorded import LOSSES, N, network, run_recorded, schedule, train_step
from safetensors.torch import load_file, save_file
from torch import nn

import dattri_core as dattri


class KilledError(Exception):
    """The training stops here."""


def train(world, folder, *, first=0, stop=None, rate=0.1, momentum=0.0, state=None):
    """Record steps from ``first`` on; raise `KilledError` before step ``stop`` is taken.

    It carries the state of the optimiser, with which another call may begin.
    """
    model, loss, data, _ = world
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum, weight_decay=0.1)
    if state is not None:
        optimizer.load_state_dict(state)
    batches = schedule()[0]
    with record(model, optimizer, folder) as run:
        assert run.position == first
        for step in range(run.position, len(batches)):
            train_step(model, optimizer, LOSSES[loss], data, batches[step])
            run.step(torch.tensor(batches[step]), epoch=step // 3)
            if step == stop:
                raise KilledError(optimizer.state_dict())
            optimizer.step()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_it_writes_down(tmp_path):
    model, loss, data, _ = network()
    batches, rates = schedule()
    run = run_recorded((model, loss, data, None), tmp_path, decay=0.1)
    checkpoints = read_run(tmp_path)
    path = run.path(torch.ones(N, dtype=torch.float64))
    assert len(checkpoints) == 10
    for at, (checkpoint, theta) in enumerate(zip(checkpoints, path, strict=True)):
        state = checkpoint.load(model)
        flat = torch.cat([state[name].flatten() for name, _ in model.named_parameters()])
        assert (flat - theta).abs().max() < 1e-12
        last = at == 9
        assert checkpoint.learning_rate == (0.0 if last else rates[at])
        assert checkpoint.step.weight_decay == (0.0 if last else 0.1)
        assert checkpoint.step.batch.tolist() == ([] if last else batches[at])
        assert checkpoint.step.epoch == (0 if last else at // 3)
        assert (checkpoint.position, checkpoint.count) == (at, 10)
    by_name = dattri.Task(model, checkpoints=str(tmp_path))  # plain safetensors files
    assert [c.name for c in by_name.checkpoints] == [c.name for c in checkpoints]


def test_the_whole_train_set_and_plain_sequences_are_batches(tmp_path):
    model, loss, data, _ = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model, optimizer, tmp_path) as run:
        for batch in (None, [1, 2], range(3)):
            train_step(model, optimizer, LOSSES[loss], data, list(batch or range(N)))
            run.step(batch)
            optimizer.step()
    batches = [checkpoint.step.batch for checkpoint in read_run(tmp_path)]
    assert batches[0] is None
    assert [b.tolist() for b in batches[1:]] == [[1, 2], [0, 1, 2], []]


def test_tied_weights_and_buffers(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model, optimizer, tmp_path) as run:
        model(torch.randn(5, 3)).sum().backward()
        run.step([0])
        optimizer.step()
    state = read_run(tmp_path)[1].load(model)
    assert torch.equal(state["1.running_mean"], model[1].running_mean)
    assert torch.equal(state["0.weight"], model[0].weight)


# --- stopped runs ---------------------------------------------------------------------------------
def test_a_run_that_was_stopped_goes_on_and_is_the_one_it_would_have_been(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(network(), whole)
    world = network()
    with pytest.raises(KilledError):
        train(world, stopped, stop=5)
    with pytest.raises(dattri.InputError, match="stopped after 6 steps, and the weights"):
        read_run(stopped)
    train(world, stopped, first=5)  # the model has the weights of step 5, which was not taken
    assert len(files(stopped)) == 10
    for left, right in zip(read_run(whole), read_run(stopped), strict=True):
        assert left.step.batch.tolist() == right.step.batch.tolist()
        model = network()[0]
        for name, tensor in left.load(model).items():
            assert torch.equal(tensor, right.load(model)[name])


def test_a_stopped_run_with_momentum_goes_on_with_the_state_of_the_optimiser(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(network(), whole, momentum=0.9)
    world = network()
    with pytest.raises(KilledError) as killed:
        train(world, stopped, stop=5, momentum=0.9)
    before = files(stopped)
    with pytest.raises(dattri.InputError, match="has no momentum of 4 parameters; load its state"):
        train(world, stopped, first=5, momentum=0.9)
    assert files(stopped) == before
    train(world, stopped, first=5, momentum=0.9, state=killed.value.args[0])
    for left, right in zip(read_run(whole), read_run(stopped), strict=True):
        model = network()[0]
        assert right.step.momentum == 0.9
        for name, tensor in left.load(model).items():
            assert torch.equal(tensor, right.load(model)[name])


def test_runs_that_were_recorded_before_there_was_momentum_are_read(tmp_path):
    path = step_file(tmp_path, 0)
    facts = {"run": "a", "position": 0, "learning_rate": 0.1, "weight_decay": 0.0, "epoch": 0}
    save_file({"w": torch.ones(1)}, path, {"dattri_step": json.dumps({**facts, "batch": [1]})})
    assert read_facts(path).momentum == 0.0


def test_it_goes_on_at_an_earlier_step_whose_weights_the_user_restored(tmp_path):
    world = network()
    with pytest.raises(KilledError):
        train(world, tmp_path, stop=6)
    world[0].load_state_dict(load_file(step_file(tmp_path, 2)))
    train(world, tmp_path, first=2)
    assert len(read_run(tmp_path)) == 10


def test_other_weights_than_those_of_any_step_are_refused(tmp_path):
    world = network()
    with pytest.raises(KilledError):
        train(world, tmp_path, stop=3)
    before = files(tmp_path)
    with torch.no_grad():
        world[0][0].bias.add_(1e-9)
    with pytest.raises(dattri.InputError, match="stopped after 4 steps, and the model has the"):
        train(world, tmp_path)
    assert files(tmp_path) == before


def test_a_whole_run_is_not_gone_on_with(tmp_path):
    world = network()
    train(world, tmp_path)
    before = files(tmp_path)
    with pytest.raises(dattri.InputError, match="holds a whole run of 9 steps; give another"):
        train(world, tmp_path)
    assert files(tmp_path) == before


def test_a_kill_while_a_file_is_written_leaves_none(tmp_path, monkeypatch):
    from dattri_unroll import run_folder

    world = network()
    with pytest.raises(KilledError):
        train(world, tmp_path, stop=2)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "save", fail)
        train(world, tmp_path, first=2)
    assert sorted(files(tmp_path)) == [f"step-0000000{at}.safetensors" for at in range(3)]
    train(world, tmp_path, first=2)
    assert len(read_run(tmp_path)) == 10


# --- damage ---------------------------------------------------------------------------------------
@pytest.fixture
def whole(tmp_path):
    train(network(), tmp_path / "run")
    return tmp_path / "run"


def refused(folder, message, kind=dattri.StoreError):
    with pytest.raises(kind, match=message):
        read_run(folder)


def test_a_changed_weight_is_seen(whole):
    path = step_file(whole, 4)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    refused(whole, r"step-00000004.*does not match its hash")
    assert len(read_run(whole, verify=False)) == 10
    with pytest.raises(dattri.StoreError, match="does not match its hash"):
        read_weights(path)


def test_a_changed_fact_is_seen(whole):
    path = step_file(whole, 4)
    header_size = int.from_bytes(path.read_bytes()[:8], "little")
    text = path.read_bytes()[8 : 8 + header_size].decode()
    data = path.read_bytes()
    changed = text.replace('\\"learning_rate\\": 0.1', '\\"learning_rate\\": 0.2')
    assert changed != text
    path.write_bytes(data[:8] + changed.encode() + data[8 + header_size :])
    refused(whole, "does not match its hash")


def test_a_truncated_file_is_refused(whole):
    path = step_file(whole, 4)
    path.write_bytes(path.read_bytes()[:-10])
    refused(whole, "is no whole safetensors file")


def test_a_missing_step_is_refused(whole):
    step_file(whole, 4).unlink()
    refused(whole, "step 4 is missing, 'step-00000005.safetensors' holds step 5")


def test_a_file_under_the_name_of_another_is_refused(whole):
    shutil.copy(step_file(whole, 3), step_file(whole, 4))
    refused(whole, "step 4 is missing, 'step-00000004.safetensors' holds step 3")


def test_a_step_of_another_run_is_refused(whole, tmp_path):
    train(network(), tmp_path / "other")
    shutil.copy(step_file(tmp_path / "other", 4), step_file(whole, 4))
    refused(whole, "'step-00000004.safetensors' belongs to another run")


def test_steps_after_the_end_are_refused(whole, tmp_path):
    facts = json.dumps(
        {"run": read_id(whole), "position": 10, "learning_rate": 0.1}
        | {"weight_decay": 0.0, "epoch": 0, "batch": [1]}
    )
    save_file({"w": torch.ones(1)}, step_file(whole, 10), metadata={"dattri_step": facts})
    refused(whole, "the run ends at step 9, and files of later steps lie beside it")


def read_id(folder):
    return read_facts(step_file(folder, 0)).run


def test_foreign_files_are_refused(whole):
    save_file({"w": torch.ones(1)}, step_file(whole, 4))
    refused(whole, "was not written by dattri_unroll.record")


def test_no_run_is_refused(tmp_path):
    refused(tmp_path, "there is none; record one", dattri.InputError)


# --- what is refused while recording --------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.RMSprop(p), "the optimiser is RMSprop"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "SGD with maximize=True or amsgrad"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "AdamW with maximize=True or amsgrad=True"),
        (lambda p: torch.optim.SGD(list(p)[:2], lr=0.1), r"parameters \['2.weight', '2.bias'\]"),
        (
            lambda p: torch.optim.SGD([*p, nn.Parameter(torch.ones(1))], lr=0.1),
            "has 1 that are not the model's",
        ),
        (
            lambda p: torch.optim.SGD(
                [{"params": [q], "momentum": 0.1 * q.dim()} for q in p], lr=0.1
            ),
            "groups with different momentum or betas",
        ),
        (
            lambda p: torch.optim.Adam([{"params": [q], "betas": (0.1 * q.dim(), 0.9)} for q in p]),
            "groups with different momentum or betas",
        ),
    ],
)
def test_optimisers_whose_steps_are_not_known_are_refused(make, message, tmp_path):
    model = network()[0]
    with (
        pytest.raises(dattri.InputError, match=message),
        record(model, make(model.parameters()), tmp_path / "run"),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_dampening_without_momentum_is_none(tmp_path):
    made = network()
    run_recorded(made, tmp_path, dampening=0.5)
    assert {c.step.dampening for c in read_run(tmp_path)} == {0.0}


def test_momentum_that_is_switched_on_later_is_refused(tmp_path):
    model = network()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(dattri.InputError, match="momentum"),
        record(model, optimizer, tmp_path) as run,
    ):
        optimizer.param_groups[0]["momentum"] = 0.5
        run.step([0])


@pytest.mark.parametrize("order", ["after", "never", "twice"])
def test_a_step_that_is_not_recorded_once_before_it_is_taken_is_refused(order, tmp_path):
    world = network()
    model, loss, data, _ = world
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(dattri.InputError, match="exactly once before every"),
        record(model, optimizer, tmp_path) as run,
    ):
        train_step(model, optimizer, LOSSES[loss], data, [0, 1])
        if order == "twice":
            run.step([0, 1])
            run.step([0, 1])
        optimizer.step()
        if order == "after":
            run.step([0, 1])


@pytest.mark.parametrize("batch", [[], [0.5], [-1], [[1, 2]], torch.tensor([True, False])])
def test_batches_that_are_no_positions_are_refused(batch, tmp_path):
    model = network()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(dattri.InputError, match="give the positions of its examples"),
        record(model, optimizer, tmp_path) as run,
    ):
        run.step(batch)


def test_a_training_without_a_step_is_refused_and_the_optimiser_is_let_go(tmp_path):
    model = network()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(dattri.InputError, match="no step was recorded"),
        record(model, optimizer, tmp_path),
    ):
        pass
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")
def test_a_run_that_is_killed_at_any_moment_goes_on(tmp_path):
    here = Path(__file__).parent
    paths = [*sys.path, here, here.parent, here.parent / "end_to_end"]
    done = subprocess.run(
        [sys.executable, str(here / "killed_recording.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["moments"] >= 12  # a file is opened and renamed for each of 6 states
    assert report["different"] == 0
    assert report["left"] == 0


def test_learning_rates_by_group_are_written_over_the_largest(tmp_path):
    made = network()
    shares = {"0.weight": 0.5, "0.bias": 2.0, "2.weight": 2.0, "2.bias": 0.0}
    run_recorded(made, tmp_path, shares=shares)
    *steps, last = read_run(tmp_path)
    for checkpoint, rate in zip(steps, schedule()[1], strict=True):
        assert checkpoint.learning_rate == 2 * rate
        assert checkpoint.step.rates == {"0.weight": 0.25, "2.bias": 0.0}
        assert checkpoint.step.rate_of("2.weight") == 1.0
    assert last.step.rates == {}


def test_a_foreign_group_that_is_added_on_the_way_is_refused(tmp_path):
    model = network()[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(dattri.InputError, match="has 1 that are not the model's"),
        record(model, optimizer, tmp_path) as run,
    ):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        run.step([0])
