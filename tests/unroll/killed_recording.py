"""Records a training in child processes that are killed, and compares what resumed ones leave.

A script of its own, so that it forks before any thread exists. Prints one JSON object.
"""

import json
import signal
import sys
from pathlib import Path

import torch
from dattri_unroll import read_run, record
from killed_run import die_at, forked
from recorded import LOSSES, network, schedule, train_step
from safetensors.torch import load_file

STEPS = 5


def train(folder):
    """Train and record; where a run was stopped, from the weights of its last recorded step on."""
    model, loss, data, _ = network()
    done = sorted(folder.glob("step-*.safetensors"))
    if done:
        model.load_state_dict(load_file(done[-1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(model, optimizer, folder) as run:
        for indices in schedule(STEPS)[0][run.position :]:
            train_step(model, optimizer, LOSSES[loss], data, indices)
            run.step(indices)
            optimizer.step()


def content(folder):
    """Return weights and facts of every step, without the name of the run."""
    return [
        {name: tensor.tolist() for name, tensor in c.load(network()[0]).items()}
        | {"rate": c.learning_rate, "batch": c.step.batch.tolist()}
        for c in read_run(folder)
    ]


def main(root):
    """Kill at every moment at which the disk changes, then resume once."""
    train(root / "whole")
    want = content(root / "whole")
    moments = different = left = 0
    for count in range(1, 1000):
        folder = root / f"killed-{count}"

        def work(folder=folder, count=count):
            die_at(count, folder)
            train(folder)

        status = forked(work)
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        moments += 1
        complete = len(list(folder.glob("step-*.safetensors"))) == STEPS + 1
        if not complete:
            assert forked(lambda folder=folder: train(folder)) == 0
        different += content(folder) != want
        left += len(list(folder.iterdir())) != STEPS + 1
    print(json.dumps({"moments": moments, "different": different, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
