"""Metrics at the sizes of the benchmarks; the goal is a million suspicions in under 2 s."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dattri_metrics import (
    auroc,
    average_precision,
    inspection_area,
    lds,
    loo_correlation,
    mixed_source_detection,
)

GOAL = 2.0


@pytest.mark.parametrize("metric", [auroc, average_precision, inspection_area])
def test_a_million_suspicions(benchmark: Any, metric: Any) -> None:
    random = np.random.default_rng(0)
    wrong = random.random(10**6) < 0.1
    suspicion = random.normal(size=10**6) + wrong
    benchmark.pedantic(metric, (suspicion, wrong), rounds=3)
    assert benchmark.stats.stats.min < GOAL


def test_lds_of_5000_by_500_on_50_subsets(benchmark: Any) -> None:
    random = np.random.default_rng(0)
    scores, masks = random.normal(size=(5000, 500)), random.random((50, 5000)) < 0.5
    outcomes = masks @ scores + 50 * random.normal(size=(50, 500))
    benchmark.pedantic(lds, (scores, masks, outcomes), kwargs={"higher_is_better": True}, rounds=3)


@pytest.mark.parametrize("correlation", ["pearson", "spearman"])
def test_leave_one_out_of_5000_by_500(benchmark: Any, correlation: str) -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=(5000, 500))
    settings = {"higher_is_better": False, "correlation": correlation}
    truth = scores + random.normal(size=scores.shape)
    benchmark.pedantic(loo_correlation, (scores, truth), kwargs=settings, rounds=1)


def test_sources_of_5000_by_500(benchmark: Any) -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=(5000, 500))
    sources = random.integers(0, 10, 5000), random.integers(0, 10, 500)
    benchmark.pedantic(mixed_source_detection, (scores, *sources), rounds=1)
