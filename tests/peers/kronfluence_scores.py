"""Writes kronfluence's (the peer's) pairwise scores, run by its own Python.

A script, not a test: ``python kronfluence_scores.py FOLDER DAMPING``. Scores are [train, test].
"""

import sys
from pathlib import Path

import numpy as np
import torch
from kronecker_worlds import MODELS, load
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import nn
from torch.utils.data import TensorDataset

STRATEGIES = ("diagonal", "kfac", "ekfac")


class Classification(Task):
    def compute_train_loss(self, batch, model, sample=False):
        assert not sample
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)


def factor_arguments(strategy):
    return FactorArguments(
        strategy=strategy,
        use_empirical_fisher=True,
        activation_covariance_dtype=torch.float64,
        gradient_covariance_dtype=torch.float64,
        eigendecomposition_dtype=torch.float64,
        lambda_dtype=torch.float64,
        per_sample_gradient_dtype=torch.float64,
    )


def main(folder, damping):
    for name in MODELS:
        model, train, test = load(folder, name)
        analyzer = Analyzer(
            name,
            prepare_model(model, Classification()),
            Classification(),
            cpu=True,
            disable_tqdm=True,
            output_dir=str(folder / "kronfluence"),
        )
        for strategy in STRATEGIES:
            analyzer.fit_all_factors(
                strategy,
                TensorDataset(*train),
                per_device_batch_size=32,
                factor_args=factor_arguments(strategy),
            )
            analyzer.compute_pairwise_scores(
                strategy,
                strategy,
                TensorDataset(*test),
                TensorDataset(*train),
                per_device_query_batch_size=20,
                per_device_train_batch_size=32,
                score_args=ScoreArguments(
                    damping_factor=damping,
                    score_dtype=torch.float64,
                    per_sample_gradient_dtype=torch.float64,
                    precondition_dtype=torch.float64,
                ),
            )
            scores = analyzer.load_pairwise_scores(strategy)["all_modules"]
            np.save(folder / f"{name}-{strategy}.npy", scores.T.double().numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
