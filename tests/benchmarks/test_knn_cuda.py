"""KNN-Shapley on a GPU, against the distance matrix and its sort on it.

Goal: 1.5 times the matrix, its sort and the way of as many scores to the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from table import Table, Theme, seconds
from torch import nn

import dattri_core as dattri

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
N_TRAIN, N_TEST, FEATURES, ROUNDS, GOAL = 50_000, 1000, 784, 5, 1.5
THEME = Theme(
    "knn_cuda",
    "KNN-Shapley on a GPU",
    f"All scores of `knn-shapley`, K = 5, {N_TRAIN} x {N_TEST}, {FEATURES} random features in "
    "float32, ten classes. Both sides begin with the features on the host and end with one number "
    "for each pair on the host: the floor is `torch.cdist(test, train).sort(dim=1)` on the GPU "
    f"and a copy of the sorted distances. The shortest of {ROUNDS} each, in turns.",
)


def timed(work: Callable[[], object]) -> float:
    """Return the wall time of work on the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def test_knn_on_cuda(benchmark: Any, table: Table) -> None:
    """All scores against the matrix and its sort."""
    generator = torch.Generator().manual_seed(0)
    train, test = (
        (
            torch.randn(count, FEATURES, generator=generator),
            torch.randint(0, 10, (count,), generator=generator),
        )
        for count in (N_TRAIN, N_TEST)
    )
    method = dattri.method("knn-shapley", inputs=True, neighbours=5)
    task = dattri.Task(nn.Linear(FEATURES, 10).cuda())

    def floor() -> object:
        distances = torch.cdist(test[0].cuda(), train[0].cuda())
        return distances.sort(dim=1).values.cpu()

    works = (lambda: method.attribute(task, train, test, progress=False), floor)
    found = benchmark.pedantic(
        lambda: [[timed(work) for work in works] for _ in range(ROUNDS)], rounds=1
    )
    own, least = (min(times) for times in zip(*found, strict=True))
    table.put(
        f"{N_TRAIN} x {N_TEST}",
        time=seconds(own),
        **{"matrix, sort and copy": seconds(least)},
        ratio=f"{own / least:.2f}",
        goal=f"<= {GOAL}",
        met=own <= GOAL * least,
    )
    print("knn", own, least)
