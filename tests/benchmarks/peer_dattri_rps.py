"""Runs representer point selection of dattri 0.3 on a saved world; prints one line of JSON.

Usage: python peer_dattri_rps.py JOB. JOB is JSON: ``world``, ``l2`` and ``scores``.
"""

import json
import sys
import time

import numpy as np
import torch
import worlds
from dattri.algorithm.rps import RPSAttributor
from dattri.task import AttributionTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Named(nn.Module):
    """The world's model with its last layer as an attribute, as it looks for it."""

    def __init__(self, model):
        super().__init__()
        *before, self.last = model
        self.before = nn.Sequential(*before)

    def forward(self, x):
        return self.last(self.before(x))


def main(job):
    world = worlds.load(job["world"])
    model = Named(world.model).eval()
    sets = [TensorDataset(*side) for side in (world.train, world.test)]
    train, test = (DataLoader(s, batch_size=len(s), shuffle=False) for s in sets)
    # It fits the layer to the model's own predictions, shares of the classes.
    task = AttributionTask(nn.functional.cross_entropy, model, model.state_dict())
    start = time.perf_counter()
    attributor = RPSAttributor(task, "last", l2_strength=job["l2"])
    attributor.cache(train)
    scores = attributor.attribute(train, test).detach().double()
    took = time.perf_counter() - start
    np.save(job["scores"], scores.numpy())
    print(json.dumps({"seconds": took, "finite": bool(torch.isfinite(scores).all())}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
