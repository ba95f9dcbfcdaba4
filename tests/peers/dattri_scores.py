"""Runs dattri (the peer) on saved weights and data, in its own environment; writes its scores.

A script, not a test: ``python dattri_scores.py FOLDER``. FOLDER holds arrays.npz with weight, bias,
weight_1, bias_1 (a second checkpoint), train and test images and labels; scores go beside it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorExplicit
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

DAMPING = 1e-2
RATES = [0.1, 0.05]


def main(folder):
    arrays = {k: torch.as_tensor(v) for k, v in np.load(folder / "arrays.npz").items()}
    model = nn.Linear(784, 10)
    states = [
        {"weight": arrays["weight"], "bias": arrays["bias"]},
        {"weight": arrays["weight_1"], "bias": arrays["bias_1"]},
    ]
    model.load_state_dict(states[0])
    model.eval()

    def loss(params, pair):
        image, label = pair
        outputs = torch.func.functional_call(model, params, image)
        return nn.CrossEntropyLoss()(outputs, label.long())

    def loader(side):
        data = TensorDataset(arrays[f"{side}_x"], arrays[f"{side}_y"])
        return DataLoader(data, batch_size=len(data), shuffle=False)  # one full batch

    train, test = loader("train"), loader("test")

    def gradients(checkpoints, weights, normalized):
        attributor = TracInAttributor(
            AttributionTask(loss_func=loss, model=model, checkpoints=checkpoints),
            weight_list=torch.tensor(weights),
            normalized_grad=normalized,
        )
        attributor.projector_kwargs = None  # None in the constructor means a sketch to 512 numbers
        return attributor.attribute(train, test)

    def influence(kind, **options):
        task = AttributionTask(loss_func=loss, model=model, checkpoints=states[0])
        attributor = kind(task=task, regularization=DAMPING, **options)
        attributor.cache(train)
        return attributor.attribute(train, test)

    with torch.no_grad():
        found = {
            "grad-dot": gradients(states[:1], [1.0], False),
            "grad-cos": gradients(states[:1], [1.0], True),
            "tracin": gradients(states, RATES, False),
            "if-cg": influence(IFAttributorCG, max_iter=100),
            "if-explicit": influence(IFAttributorExplicit),
        }
    for name, scores in found.items():
        np.save(folder / f"{name}.npy", scores.detach().double().numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
