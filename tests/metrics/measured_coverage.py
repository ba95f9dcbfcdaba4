"""How often 95 % intervals hold the truth, in populations where it is known.

``python tests/metrics/measured_coverage.py`` prints the table of ``docs/metrics.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from attrs import frozen
from dattri_metrics import (
    Bootstrap,
    auroc,
    average_precision,
    brittleness,
    class_detection,
    curve,
    inspection_area,
    lds,
    loo_correlation,
    rank_stability,
    shortcut_detection,
)
from scipy import stats

REPEATS = 1000
SHORT = Bootstrap(400)


@frozen
class Case:
    """A population: the metric of one sample of it by a random generator, and the truth.

    Without one, the truth is the mean of the metric over 4000 other samples: of average precision,
    that of few examples is not that of many.
    """

    metric: str
    where: str
    draw: Callable
    truth: float | None = None

    @property
    def target(self):
        if self.truth is not None:
            return self.truth
        others = (self.draw(np.random.default_rng([9, seed])).value for seed in range(4000))
        return float(np.mean(list(others)))

    def measured(self, repeats=REPEATS):
        """Return the share of intervals that hold the truth, and their mean width."""
        truth, held, width = self.target, 0, 0.0
        for seed in range(repeats):
            found = self.draw(np.random.default_rng(seed))
            held += found.low <= truth <= found.high
            width += found.high - found.low
        return held / repeats, width / repeats


def _count(number, thing):
    return f"{number} {thing}" + "s" * (number > 1)


def suspects(function, n, p, apart, random_share=False):
    """Normal suspicions, those of the wrong labels higher by ``apart``."""

    def draw(random):
        wrong = random.random(n) < p / n if random_share else np.arange(n) < p
        wrong[0], wrong[-1] = True, False  # both are there
        return function(random.normal(size=n) + apart * wrong, wrong, bootstrap=SHORT)

    return draw


def ranked(n, p, apart):
    area = stats.norm.cdf(apart / math.sqrt(2))
    where = f"n = {n}, {p} wrong, AUROC {area:.2f}"
    return Case("mislabel-auroc", where, suspects(auroc, n, p, apart), float(area))


def precise(n, p, apart):
    draw = suspects(average_precision, n, p, apart)
    return Case("mislabel-average-precision", f"n = {n}, {p} wrong, {apart} apart", draw)


def hits(share, tests, k=1, spread=None):
    """Tests whose k best are of their class with a chance, or a chance that differs by test."""
    train = np.arange(60) % 2

    def draw(random):
        classes = random.integers(0, 2, tests)
        chance = np.full(tests, share)
        if spread is not None:
            chance = random.beta(share * spread, (1 - share) * spread, tests)
        right = random.binomial(k, chance)
        scores = random.random((60, tests))
        for j in range(tests):
            same = np.flatnonzero(train == classes[j])
            other = np.flatnonzero(train != classes[j])
            scores[same[: right[j]], j] += 1
            scores[other[: k - right[j]], j] += 1
        return class_detection(scores, train, classes, k=k, bootstrap=SHORT)

    where = f"share {share}, k = {k}, {_count(tests, 'test')}"
    return Case("class-detection", where, draw, share)


def marked(n, p, tests, apart, shared):
    def draw(random):
        marks = np.arange(n) < p
        noise = _shared(random, n, tests, shared)
        centre = apart + 0.3 * random.normal(size=tests)
        scores = noise + centre * marks[:, None]
        return shortcut_detection(scores, marks, np.ones(tests), bootstrap=SHORT)

    where = f"n = {n}, {p} marked, {_count(tests, 'test')}, {apart} apart, shared {shared}"
    return Case("shortcut-detection", where, draw)


def medians(tests):
    def draw(random):
        removals = np.minimum(random.geometric(0.1, size=tests), 51)
        return brittleness(removals, removals, largest=50, bootstrap=SHORT)

    return Case("brittleness", f"{_count(tests, 'test')}, median 7", draw, 7.0)


def _shared(random, rows, tests, shared):
    """Unit normals, whose columns have a part in common."""
    own = math.sqrt(1 - shared) * random.normal(size=(rows, tests))
    return math.sqrt(shared) * random.normal(size=(rows, 1)) + own


def _pair(random, rows, tests, shared, level):
    one, noise = (_shared(random, rows, tests, shared) for _ in range(2))
    return one, level * one + math.sqrt(1 - level**2) * noise


def of_ranks(level):
    """Spearman's correlation of a normal pair with Pearson's ``level``."""
    return 6 / math.pi * math.asin(level / 2)


def datamodels(rows, tests, shared, level):
    def draw(random):
        sums, outcomes = _pair(random, rows, tests, shared, level)
        masks = np.eye(rows, dtype=bool)  # the sum over a set of one is its score
        return lds(sums, masks, outcomes, higher_is_better=True, bootstrap=SHORT)

    truth = of_ranks(level)
    where = f"{rows} subsets, {_count(tests, 'test')}, true {truth:.2f}, shared {shared}"
    return Case("lds", where, draw, truth)


def left_out(kind, rows, tests, shared, level):
    def draw(random):
        scores, effects = _pair(random, rows, tests, shared, level)
        return loo_correlation(
            scores, effects, higher_is_better=False, correlation=kind, bootstrap=SHORT
        )

    truth = level if kind == "pearson" else of_ranks(level)
    where = f"{rows} examples, {_count(tests, 'test')}, true {truth:.2f}, shared {shared}"
    return Case(f"loo-{kind}", where, draw, truth)


def stable(rows, tests, level):
    def draw(random):
        return rank_stability(np.stack(_pair(random, rows, tests, 0.3, level)), bootstrap=SHORT)

    truth = of_ranks(level)
    where = f"{rows} examples, {_count(tests, 'test')}, true {truth:.2f}, shared 0.3"
    return Case("rank-stability", where, draw, truth)


def heights(trainings, tests):
    def draw(random):
        of_test, of_training = random.normal(size=(1, 1, tests)), random.normal(size=trainings)
        cells = of_test + of_training[:, None] + random.normal(size=(4, trainings, tests))
        made = curve("removal", np.linspace(0, 0.5, 4), cells, cells, higher_is_better=True)
        return made.area(SHORT)

    return Case(
        "removal-curve", f"{_count(trainings, 'training')}, {_count(tests, 'test')}", draw, 0.0
    )


CASES = (
    ranked(1437, 143, 3.3),
    ranked(150, 15, 3.3),
    ranked(100, 10, 3.3),
    ranked(500, 50, 2.5),
    ranked(100, 10, 2.5),
    ranked(30, 3, 2.5),
    ranked(30, 3, 1.0),
    ranked(100, 10, 0.0),
    precise(500, 50, 2.5),
    precise(100, 10, 2.5),
    precise(100, 10, 1.0),
    precise(30, 3, 1.0),
    Case(
        "mislabel-inspection-area",
        "n = 100, each wrong with 0.1, 2.5 apart",
        suspects(inspection_area, 100, 10, 2.5, random_share=True),
    ),
    hits(0.95, 20),
    hits(0.95, 50),
    hits(0.98, 100),
    hits(0.8, 20),
    hits(0.8, 20, k=10, spread=10),
    hits(0.95, 20, k=10, spread=10),
    marked(150, 45, 15, 1.5, 0.3),
    marked(100, 10, 10, 3.5, 0.9),
    marked(100, 10, 1, 2.5, 0.0),
    medians(10),
    medians(50),
    datamodels(10, 1, 0.0, 0.6),
    datamodels(20, 1, 0.0, 0.6),
    datamodels(50, 1, 0.0, 0.6),
    datamodels(5, 20, 0.3, 0.6),
    datamodels(8, 30, 0.9, 0.6),
    datamodels(10, 20, 0.8, 0.6),
    datamodels(50, 40, 0.3, 0.6),
    datamodels(50, 40, 0.0, 0.9),
    datamodels(50, 40, 0.5, 0.0),
    left_out("pearson", 10, 1, 0.0, 0.6),
    left_out("pearson", 20, 1, 0.0, 0.6),
    left_out("pearson", 50, 1, 0.0, 0.6),
    left_out("pearson", 100, 10, 0.3, 0.6),
    left_out("spearman", 20, 1, 0.0, 0.6),
    left_out("spearman", 100, 10, 0.3, 0.6),
    stable(30, 5, 0.9),
    heights(2, 20),
    heights(3, 20),
    heights(5, 20),
)


def table(cases=CASES, repeats=REPEATS):
    """Return the lines of the table, one for each case."""
    lines = ["| metric | where | coverage | mean width |", "|---|---|---|---|"]
    for case in cases:
        held, width = case.measured(repeats)
        lines.append(f"| `{case.metric}` | {case.where} | {held:.3f} | {width:.3f} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
