"""Runs dattri 0.3 on saved weights and data, in its own environment; prints one line of JSON.

Usage: python peer_dattri.py WORLD.npz METHOD BATCH [REPEATS] [SCORES.npy]
BATCH 0 means the whole set at once. Run inside of ``torch.no_grad()`` as its examples do.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorExplicit
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def _resident_mib(which):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{which} is not in /proc/self/status; peak memory is measured on Linux")


def _model(arrays):
    layers = []
    for at in range(sum(name.startswith("weight") for name in arrays)):
        weight, bias = arrays[f"weight{at}"], arrays[f"bias{at}"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data = torch.from_numpy(weight)
        layer.bias.data = torch.from_numpy(bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def main(path, method, batch, repeats=1, out=None):
    arrays = dict(np.load(path, allow_pickle=False))
    model = _model(arrays).eval()
    sets = [
        TensorDataset(
            torch.from_numpy(arrays[f"{part}_inputs"]), torch.from_numpy(arrays[f"{part}_labels"])
        )
        for part in ("train", "test")
    ]
    train, test = (DataLoader(s, batch_size=batch or len(s), shuffle=False) for s in sets)

    def loss(parameters, data_target_pair):
        inputs, labels = data_target_pair
        outputs = torch.func.functional_call(model, parameters, inputs)
        return nn.functional.cross_entropy(outputs, labels.long())

    task = AttributionTask(loss, model, model.state_dict())

    def attribute():
        if method.startswith("grad") or method == "tracin":
            attributor = TracInAttributor(
                task,
                weight_list=torch.ones(1),
                normalized_grad=method == "grad-cos",
                device="cpu",
            )
            attributor.projector_kwargs = None  # its default is a random projection to 512
            with torch.no_grad():
                return attributor.attribute(train, test)
        if method == "if-cg":
            attributor = IFAttributorCG(task, device="cpu", max_iter=10, regularization=1e-2)
        else:
            attributor = IFAttributorExplicit(task, device="cpu", regularization=1e-2)
        attributor.cache(train)
        with torch.no_grad():
            return attributor.attribute(train, test)

    baseline = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    times = []
    for _ in range(int(repeats)):
        start = time.perf_counter()
        scores = attribute()
        times.append(time.perf_counter() - start)
    if out:
        np.save(out, scores.detach().numpy())
    print(json.dumps({"seconds": min(times), "peak_mib": _resident_mib("VmHWM") - baseline}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
