"""Runs KNN-Shapley of dattri and of pyDVL (the peers) on saved data; writes their values.

A script, not a test: ``python knn_scores.py FOLDER K ...``. FOLDER holds arrays.npz with train and
test inputs and labels; dattri_K.npy ``[n, m]`` and pydvl_K.npy ``[n]``, the mean over the test
examples, go beside it for every K.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from dattri.algorithm.data_shapley import KNNShapleyAttributor
from pydvl.valuation.dataset import Dataset
from pydvl.valuation.methods.knn_shapley import KNNShapleyValuation
from sklearn.neighbors import KNeighborsClassifier
from torch.utils.data import DataLoader, TensorDataset


def main(folder, neighbours):
    arrays = dict(np.load(folder / "arrays.npz"))
    sides = [(arrays[f"{side}_x"], arrays[f"{side}_y"]) for side in ("train", "test")]
    loaders = [
        DataLoader(TensorDataset(*map(torch.as_tensor, side)), batch_size=64, shuffle=False)
        for side in sides
    ]
    train, test = (Dataset(*side) for side in sides)
    for k in neighbours:
        scores = KNNShapleyAttributor(k_neighbors=k).attribute(*loaders)
        np.save(folder / f"dattri_{k}.npy", scores.T.double().numpy())  # test examples come first
        model = KNeighborsClassifier(n_neighbors=k)
        values = KNNShapleyValuation(model, test, progress=False).fit(train).result.values
        np.save(folder / f"pydvl_{k}.npy", values)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(k) for k in sys.argv[2:]])
