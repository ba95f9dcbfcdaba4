"""Runs TRAK of dattri 0.3 on a saved world with an ensemble; prints one line of JSON.

Usage: python peer_dattri_trak.py JOB. JOB is JSON: ``world``, ``checkpoints`` (a folder of
safetensors files), ``dim``, ``projection`` (dattri's name), ``batch``, ``regularization`` and
``scores``.
"""

import contextlib
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import worlds
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main(job):
    world = worlds.load(job["world"])
    # It calls the model on examples without an axis that counts them, which nn.Flatten refuses.
    model = nn.Sequential(*(m for m in world.model if not isinstance(m, nn.Flatten)))
    names = list(model.state_dict())
    states = []
    for path in sorted(Path(job["checkpoints"]).glob("*.safetensors")):
        found = load_file(path)
        shifted = dict(zip(world.model.state_dict(), names, strict=True))
        states.append({shifted[name]: value for name, value in found.items()})

    def log_odds(parameters, pair):
        inputs, label = pair
        outputs = torch.func.functional_call(model, parameters, inputs.unsqueeze(0))
        log_p = -nn.functional.cross_entropy(outputs, label.unsqueeze(0))
        return log_p - torch.log(1 - torch.exp(log_p))

    def probability(parameters, pair):
        inputs, label = pair
        outputs = torch.func.functional_call(model, parameters, inputs.unsqueeze(0))
        return torch.exp(-nn.functional.cross_entropy(outputs, label.unsqueeze(0)))

    def load(state_model, state):
        state_model.load_state_dict(state)
        return state_model.eval()

    sets = [TensorDataset(*side) for side in (world.train, world.test)]
    train, test = (DataLoader(s, batch_size=job["batch"], shuffle=False) for s in sets)
    task = AttributionTask(log_odds, model, states, checkpoints_load_func=load)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        attributor = TRAKAttributor(
            task,
            probability,
            projector_kwargs={
                "proj_dim": job["dim"],
                "proj_type": job["projection"],
                "proj_max_batch_size": 32,
                "proj_seed": 0,
                "device": "cpu",
            },
            regularization=job["regularization"],
        )
        with torch.no_grad():
            attributor.cache(train)
            scores = attributor.attribute(test)
    took = time.perf_counter() - start
    scores = scores.detach().double()
    np.save(job["scores"], scores.numpy())
    print(json.dumps({"seconds": took, "finite": bool(torch.isfinite(scores).all())}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
