"""Runs TRAK of dattri (the peer) on saved weights and data, without a sketch; writes its scores.

A script, not a test: ``python dattri_trak_scores.py FOLDER RIDGE``. FOLDER holds arrays.npz with
the weights of each checkpoint (``0:0.weight`` and so on), train and test inputs and labels.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main(folder, ridge):
    arrays = {k: torch.as_tensor(v) for k, v in np.load(folder / "arrays.npz").items()}
    states = {}
    for key, value in arrays.items():
        if ":" in key:
            at, name = key.split(":")
            states.setdefault(int(at), {})[name] = value
    hidden, inputs = states[0]["0.weight"].shape
    model = nn.Sequential(
        nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, len(states[0]["2.bias"]))
    )
    model.load_state_dict(states[0])
    model.eval()

    def probability(params, pair):
        image, label = pair
        outputs = torch.func.functional_call(model, params, image.unsqueeze(0))
        return (-nn.functional.cross_entropy(outputs, label.unsqueeze(0))).exp()

    def margin(params, pair):
        p = probability(params, pair)
        return p.log() - (1 - p).log()

    def loader(side):
        data = TensorDataset(arrays[f"{side}_x"], arrays[f"{side}_y"])
        return DataLoader(data, batch_size=64, shuffle=False)

    task = AttributionTask(
        loss_func=margin, model=model, checkpoints=[states[at] for at in sorted(states)]
    )
    attributor = TRAKAttributor(
        task=task,
        correct_probability_func=probability,
        projector_kwargs={"proj_type": "identity"},
        regularization=ridge,
    )
    with torch.no_grad():
        attributor.cache(loader("train"))
        scores = attributor.attribute(loader("test"))
    np.save(folder / "trak.npy", scores.detach().double().numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
