"""Runs kronfluence's EK-FAC on a saved world, in its own environment; prints one line of JSON.

Usage: python peer_kronfluence.py JOB. JOB is JSON: ``world``, ``damping`` (null: a tenth of each
layer's mean eigenvalue), ``fit_batch``, ``train_batch``, ``query_batch`` and optionally ``scores``
(a file for the matrix, [train, test]).
"""

import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import worlds
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.utils.data import TensorDataset


def _resident_mib(which):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{which} is not in /proc/self/status; peak memory is measured on Linux")


class SummedLoss(Task):
    """The loss of the world, on both sides."""

    def __init__(self, world):
        self.world = world

    def compute_train_loss(self, batch, model, sample=False):
        assert not sample  # the empirical Fisher is asked for
        inputs, labels = batch
        return worlds.summed_loss(self.world, model(inputs), labels)

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_attention_mask(self, batch):
        """Return which positions count: the last character of a sequence predicts nothing."""
        if self.world.loss != "causal-lm":
            return None
        mask = torch.ones_like(batch[0])
        mask[:, -1] = 0
        return mask


def main(job, folder):
    world = worlds.load(job["world"])
    train, test = (TensorDataset(*side) for side in (world.train, world.test))
    baseline = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    task = SummedLoss(world)
    analyzer = Analyzer(
        "bench",
        prepare_model(world.model, task),
        task,
        cpu=True,
        log_level=logging.ERROR,
        disable_tqdm=True,
        output_dir=folder,
    )
    start = time.perf_counter()
    analyzer.fit_all_factors(
        "factors",
        train,
        per_device_batch_size=job["fit_batch"],
        factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
    )
    middle = time.perf_counter()
    fit_peak = _resident_mib("VmHWM") - baseline
    Path("/proc/self/clear_refs").write_text("5")
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        query_dataset=test,
        train_dataset=train,
        per_device_query_batch_size=job["query_batch"],
        per_device_train_batch_size=job["train_batch"],
        score_args=ScoreArguments(damping_factor=job["damping"]),
    )
    end = time.perf_counter()
    score_peak = _resident_mib("VmHWM") - baseline
    scores = analyzer.load_pairwise_scores("scores")["all_modules"].T.double()
    if job.get("scores"):
        np.save(job["scores"], scores.numpy())
    print(
        json.dumps(
            {
                "seconds": end - start,
                "fit": middle - start,
                "score": end - middle,
                "peak_mib": max(fit_peak, score_peak),
                "finite": bool(torch.isfinite(scores).all()),
            }
        )
    )


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as made:
        main(given, made)
