"""Runs KNN-Shapley of pyDVL 0.10 on saved features; prints one line of JSON.

Usage: python peer_pydvl_knn.py JOB. JOB is JSON: ``arrays``, ``neighbours`` and ``scores``, where
the values of the train examples go: pyDVL gives their mean over the test examples alone.
"""

import json
import sys
import time

import numpy as np
from pydvl.valuation.dataset import Dataset
from pydvl.valuation.methods.knn_shapley import KNNShapleyValuation
from sklearn.neighbors import KNeighborsClassifier


def main(job):
    arrays = dict(np.load(job["arrays"]))
    train, test = (Dataset(arrays[f"{s}_x"], arrays[f"{s}_y"]) for s in ("train", "test"))
    model = KNeighborsClassifier(n_neighbors=job["neighbours"])
    start = time.perf_counter()
    valuation = KNNShapleyValuation(model, test, progress=False).fit(train)
    took = time.perf_counter() - start
    np.save(job["scores"], valuation.result.values)
    print(json.dumps({"seconds": took}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
