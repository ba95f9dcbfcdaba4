"""Writes curvlinops' (the peer's) K-FAC and EK-FAC matrices, run by its own Python.

A script, not a test: ``python curvlinops_dense.py FOLDER``. Each matrix is over all parameters in
the order of the model.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from curvlinops import EKFACLinearOperator, FisherType, KFACLinearOperator
from kronecker_worlds import MODELS, load
from torch import nn

OPERATORS = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}
FISHERS = {"ggn": FisherType.TYPE2, "empirical": FisherType.EMPIRICAL}


def main(folder):
    for name in MODELS:
        model, train, _ = load(folder, name)
        params = [p for p in model.parameters() if p.requires_grad]
        for kind, operator in OPERATORS.items():
            for fisher, value in FISHERS.items():
                matrix = operator(
                    model,
                    nn.CrossEntropyLoss(reduction="mean"),
                    params,
                    [train],
                    fisher_type=value,
                    separate_weight_and_bias=False,
                )
                size = sum(p.numel() for p in params)
                dense = matrix @ torch.eye(size, dtype=torch.float64)
                np.save(folder / f"{name}-{kind}-{fisher}.npy", dense.detach().numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
