"""Runs KNN-Shapley of dattri 0.3 on saved features; prints one line of JSON.

Usage: python peer_dattri_knn.py JOB. JOB is JSON: ``arrays``, ``neighbours`` and ``scores``.
"""

import json
import sys
import time

import numpy as np
import torch
from dattri.algorithm.data_shapley import KNNShapleyAttributor
from torch.utils.data import DataLoader, TensorDataset


def main(job):
    arrays = {name: torch.as_tensor(part) for name, part in np.load(job["arrays"]).items()}
    sets = [TensorDataset(arrays[f"{side}_x"], arrays[f"{side}_y"]) for side in ("train", "test")]
    train, test = (DataLoader(s, batch_size=len(s), shuffle=False) for s in sets)
    start = time.perf_counter()
    scores = KNNShapleyAttributor(k_neighbors=job["neighbours"]).attribute(train, test)
    took = time.perf_counter() - start
    np.save(job["scores"], scores.T.double().numpy())  # it has the test examples first
    print(json.dumps({"seconds": took}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
