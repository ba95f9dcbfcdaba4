"""Rank correlation of methods against SciPy, one test example at a time."""

import numpy as np
from dattri_reports.sections.agreement import spearman
from scipy.stats import spearmanr


def test_equals_scipy_column_by_column():
    rng = np.random.default_rng(0)
    scores = [np.round(rng.normal(size=(30, 4)), 1) for _ in range(3)]  # with ties
    found = spearman(scores)
    for i, left in enumerate(scores):
        for j, right in enumerate(scores):
            want = np.mean([spearmanr(left[:, c], right[:, c]).statistic for c in range(4)])
            assert abs(found[i, j] - want) < 1e-12


def test_a_constant_column_has_no_ranking():
    assert spearman([np.ones((5, 2)), np.random.default_rng(0).normal(size=(5, 2))])[0, 1] == 0
