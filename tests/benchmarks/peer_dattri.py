"""Runs dattri 0.3 on a saved world, in its own environment; prints one line of JSON.

Usage: python peer_dattri.py JOB. JOB is JSON: ``world``, ``method``, and optionally ``batch`` (0,
the default, is the whole set at once), ``repeats``, ``damping`` and ``scores`` (a file for the
matrix).
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import worlds
from dattri.algorithm import influence_function as influence
from dattri.algorithm.logra import LoGraAttributor
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def _resident_mib(which):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{which} is not in /proc/self/status; peak memory is measured on Linux")


class Batched(nn.Module):
    """Gives the one example that LoGra measures its layers on an axis that counts examples."""

    def forward(self, x):
        return x.reshape(-1, x.shape[-1])


def _of_parameters(model):
    """Return the mean loss as a function of parameters, as dattri's influence functions take it."""

    def loss(parameters, data_target_pair):
        inputs, labels = data_target_pair
        outputs = torch.func.functional_call(model, parameters, inputs)
        return nn.functional.cross_entropy(outputs, labels.long())

    return loss


def _of_model(model, batch, device):
    """Return the summed loss as dattri's LoGra takes it."""
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels.long(), reduction="sum")


def _influence(task, method, damping):
    if method == "if-explicit":
        return influence.IFAttributorExplicit(task, regularization=damping)
    if method == "if-cg":
        return influence.IFAttributorCG(task, max_iter=10, regularization=damping)
    if method == "if-lissa":
        return influence.IFAttributorLiSSA(task, recursion_depth=100, damping=damping)
    if method == "if-arnoldi":
        return influence.IFAttributorArnoldi(task, proj_dim=50, max_iter=50, regularization=damping)
    if method == "if-datainf":
        return influence.IFAttributorDataInf(task, regularization=damping)
    if method == "if-ekfac":
        return influence.IFAttributorEKFAC(task, damping=damping)
    raise ValueError(f"no method {method!r} of dattri here")


def attribute(world, method, batch, damping):
    """Return the scores, as dattri's examples compute them: inside of ``torch.no_grad()``."""
    sets = [TensorDataset(*side) for side in (world.train, world.test)]
    train, test = (DataLoader(s, batch_size=batch or len(s), shuffle=False) for s in sets)
    state = world.model.state_dict()
    if method == "logra":
        task = AttributionTask(_of_model, world.model, state)
        attributor = LoGraAttributor(task, damping=damping, proj_dim=4096)
        attributor.cache(train)
        return attributor.attribute(train, test)
    task = AttributionTask(_of_parameters(world.model), world.model, state)
    if method in ("grad-dot", "grad-cos", "tracin"):
        attributor = TracInAttributor(
            task, weight_list=torch.ones(1), normalized_grad=method == "grad-cos", device="cpu"
        )
        attributor.projector_kwargs = None  # its default is a random projection to 512
    else:
        attributor = _influence(task, method, damping)
        attributor.cache(train)
    with torch.no_grad():
        return attributor.attribute(train, test)


def main(job):
    world = worlds.load(job["world"])
    # It calls the model on examples without an axis that counts them, which nn.Flatten refuses.
    layers = [m for m in world.model if not isinstance(m, nn.Flatten)]
    if job["method"] == "logra":
        layers = [Batched(), *layers]
    world.model = nn.Sequential(*layers)
    baseline = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    times = []
    for _ in range(job.get("repeats", 1)):
        # LoGra leaves a file where it runs, which spoils its next run there.
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            os.chdir(folder)
            start = time.perf_counter()
            scores = attribute(world, job["method"], job.get("batch", 0), job.get("damping", 1e-2))
            times.append(time.perf_counter() - start)
            os.chdir("/")
    peak = _resident_mib("VmHWM") - baseline
    scores = scores[0] if isinstance(scores, tuple) else scores
    scores = scores.detach().double()
    if job.get("scores"):
        np.save(job["scores"], scores.numpy())
    finite = bool(torch.isfinite(scores).all())
    print(json.dumps({"seconds": min(times), "peak_mib": peak, "finite": finite}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
